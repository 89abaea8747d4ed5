"""`deepcloze export`: what is exported and where to, and folders of transformers."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, write_best
from experiment.run_files.retention import discard
from finetune.export.command import export_command
from finetune.options import ExportOptions
from finetune.prediction import onnx_model
from hub_server import HubServer
from launcher.cli import main
from pretrain.training.checkpoint_tensors import write_hugging_face_folder
from pretrain.world import World
from rank_pool import ForkServer, RankPool

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}


def export(checkpoint: Path | str, output: Path | str, **options: Any) -> None:
    export_command(ExportOptions(checkpoint=str(checkpoint), output=str(output), **options))


@pytest.fixture
def run(tmp_path: Path, wordpiece: Path) -> Path:
    """A run with complete checkpoints of steps 1 and 2, whose weights are all 1 and all 2."""
    model = BertForMaskedLM(BertConfig(vocab_size=200, **TINY))
    for step in (1, 2):
        weights = {name: torch.full_like(p, float(step)) for name, p in model.named_parameters()}
        folder = checkpoint_path(tmp_path / "run" / "checkpoints", step)
        write_hugging_face_folder(weights, model, load_tokenizer(wordpiece), folder / "hf")
        mark_complete(folder)
    return tmp_path / "run"


def step_of(folder: Path) -> float:
    """The step that the weights in a Hugging Face folder are from."""
    return AutoModelForMaskedLM.from_pretrained(folder).bert.embeddings.word_embeddings.weight[0, 0].item()


def test_export_copies_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    """Catches an older checkpoint, an incomplete copy, and temporary files next to it."""
    export(run, tmp_path / "new" / "encoder")
    assert step_of(tmp_path / "new" / "encoder") == 2.0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["encoder"]


def test_an_export_of_a_run_names_its_best_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an overfitted model that is published without a word, and one word too many."""
    write_best(run / "checkpoints", 2)
    export(run, tmp_path / "a")
    export(checkpoint_path(run / "checkpoints", 1), tmp_path / "b")
    assert not capsys.readouterr().err
    write_best(run / "checkpoints", 1)
    export(run, tmp_path / "c")
    assert capsys.readouterr().err.endswith(f"the best one is step 1: {run}/checkpoints/best\n")


def test_only_what_the_checkpoint_lists_is_exported(run: Path, tmp_path: Path) -> None:
    """Catches a file that was put into a checkpoint later, such as other weights, and is published with it."""
    hf = checkpoint_path(run / "checkpoints", 2) / "hf"
    expected = {path.name for path in hf.iterdir()} | {"README.md"}
    (hf / "pytorch_model.bin").write_text("of somebody else")
    (hf / "notes").mkdir()
    (hf / "notes" / "private.txt").write_text("about the data")
    (tmp_path / "link").symlink_to(hf)
    for source in (run, hf, tmp_path / "link"):
        output = tmp_path / "exported" / source.name
        export(source, output)
        assert {path.name for path in output.rglob("*")} == expected


def test_only_the_files_of_a_model_are_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches secrets and optimizer states in the folder of a training, which `--push` would publish, and modules of
    sentence-transformers or code of the model that are missing, in silence."""
    folder = Path(shutil.copytree(checkpoint_path(run / "checkpoints", 2) / "hf", tmp_path / "source"))
    kept = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"}
    kept |= {"2_Asym/query_0_Dense/model.safetensors", "10_Dense/model.safetensors", "größe/config.json"}
    kept |= {"LICENSE", "dict.txt", "modeling_x.py"}
    expected = kept | {path.name for path in folder.iterdir()} | {"README.md"}
    others = (".env", ".git/config", "checkpoint-10/optimizer.pt", "training_args.bin", "data/train.csv")
    for name in (*kept, *others, "hf_token.json", "3_Old/x.json", "1_Pooling/.env"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    paths = ("", "./1_Pooling", "2_Asym/", "10_Dense", "größe")
    (folder / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    export(folder, output := tmp_path / "exported")
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} == expected
    assert {path.name for path in output.iterdir() if path.is_dir()} == {Path(path).name for path in paths} - {""}
    assert (
        "left out: .env, .git, 3_Old, checkpoint-10, data, hf_token.json, training_args.bin\n"
        in capsys.readouterr().out
    )
    (folder / "modules.json").write_text("[1]")
    with pytest.raises(UserError, match=r"modules.json: expected a list of modules"):
        export(folder, tmp_path / "damaged")


def test_modules_that_are_missing(run: Path, tmp_path: Path) -> None:
    """Catches an export that sentence-transformers cannot open, and a refusal because of a module without files."""
    folder = Path(shutil.copytree(checkpoint_path(run / "checkpoints", 2) / "hf", tmp_path / "source"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"modules\.json names the module 1_Pooling, but there is no such folder"):
        export(folder, tmp_path / "incomplete")
    (folder / "1_Pooling").mkdir()
    export(folder, tmp_path / "complete")


def test_modules_of_a_model_of_the_hub(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """Catches a download of the model without its modules."""
    modules = {"1_Pooling/config__json": b"{}", "modules__json": b'[{"path": "1_Pooling"}]'}
    hub.repository("org/tiny").push_folder(checkpoint_path(run / "checkpoints", 2) / "hf", **modules)
    export("org/tiny", output := tmp_path / "exported")
    assert (output / "1_Pooling" / "config.json").read_text() == "{}"


def test_the_card_and_the_license_of_a_model_of_the_hub(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """Catches a copy without the license that its author has chosen, and one that does not name the original."""
    folder = checkpoint_path(run / "checkpoints", 2) / "hf"
    hub.repository("org/tiny").push_folder(folder, README__md=b"Theirs.", LICENSE=b"Be kind.")
    export("org/tiny", output := tmp_path / "exported")
    assert (output / "README.md").read_text() == "Theirs."
    assert (output / "LICENSE").read_text() == "Be kind."
    hub.repository("org/bare").push_folder(folder)
    export("org/bare", output := tmp_path / "bare")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/bare"


def test_export_does_not_overwrite(run: Path, tmp_path: Path) -> None:
    """Catches a user's files that an export replaces."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="mine already exists"):
        export(run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_the_output_can_be_an_empty_folder(run: Path, tmp_path: Path) -> None:
    """Catches an empty folder that is rejected."""
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert step_of(tmp_path / "empty") == 2.0


def test_the_output_can_be_the_working_directory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback: '.' has no name, and relative paths begin in a folder that is replaced."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(Path(os.path.relpath(run)), ".")
    assert step_of(tmp_path / "here") == 2.0


def test_a_failed_export_leaves_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a partial folder under the final name, and a trace for a full disk."""

    def full(source: Path, target: Path, **_: Any) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.export.command.shutil.copytree", full)
    with pytest.raises(UserError, match=r"cannot write .*encoder: disk full"):
        export(run, tmp_path / "encoder")
    assert list(tmp_path.glob("*encoder*")) == []


def test_a_checkpoint_that_its_run_deletes_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a message that names the output as the cause, and quotes shutil."""
    checkpoint = checkpoint_path(run / "checkpoints", 2)

    class Unlisted(set[Path]):
        def __contains__(self, path: object) -> bool:  # while the folder is copied
            if checkpoint.exists():
                discard(checkpoint)
            return False

    monkeypatch.setattr("finetune.export.command.unlisted_files", lambda _: Unlisted())
    with pytest.raises(UserError, match=r"^.*/step-00000002/hf was deleted while it was read: .*; run the command ag"):
        export(run, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    monkeypatch.undo()
    export(run, tmp_path / "encoder")
    assert step_of(tmp_path / "encoder") == 1.0


def test_the_output_cannot_be_in_what_is_exported(run: Path) -> None:
    """Catches a folder that is copied into itself until the disk is full, through a link too."""
    source = checkpoint_path(run / "checkpoints", 1) / "hf"
    (run / "link").symlink_to(source)
    for output in (source / "copy", run / "link" / "deep" / "copy"):
        with pytest.raises(UserError, match="copy is in the folder that is exported; choose another --output"):
            export(source, output)
    assert sorted(path.name for path in source.iterdir() if path.is_dir()) == []


def test_a_home_folder_can_be_abbreviated(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder called `~`: the shell does not expand `--output=~/encoder`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    export(Path("~/run"), "~/encoder")
    assert step_of(tmp_path / "encoder") == 2.0


def test_a_finetuned_run_gives_the_model_of_its_best_seed(trained_run: Path, tmp_path: Path) -> None:
    """Catches a fine-tuned run taken for a pretraining run, and a model folder without its task."""
    export(trained_run, tmp_path / "model")
    results = json.loads((trained_run / "results.json").read_text())
    scores = dict(zip(results["seeds"], results["splits"]["validation"]["macro_f1"]["values"], strict=True))
    source = trained_run / f"seed-{max(scores, key=scores.__getitem__)}" / "model"
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    assert "deepcloze_task.json" in files


def test_int8_needs_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that is ignored."""
    assert main(["export", "--checkpoint", str(run), "--output", str(tmp_path / "out"), "--int8"]) == 2
    assert "--int8 needs --format onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the extra `onnx` is not installed."""
    found = onnx_model.find_spec
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(UserError, match=r"onnxscript not installed; run: pip install 'deepcloze\[onnx\]'"):
        export(run, tmp_path / "out", format="onnx")
    assert list(tmp_path.glob("*out*")) == []


def onnx_packages_case(_: World) -> set[str]:
    """The packages of the extra `onnx` that the commands import."""
    for module in ("finetune.export.command", "finetune.prediction.predictor"):
        importlib.import_module(module)
    return {"onnx", "onnxruntime", "onnxscript"} & sys.modules.keys()


def test_other_formats_import_no_onnx(fork_server: ForkServer) -> None:
    """Catches commands that need the extra `onnx` though they write and read no ONNX."""
    pool = RankPool(fork_server, 1)
    assert pool.run(onnx_packages_case) == [set()]
    pool.close()


def test_an_encoder_without_a_head_is_rejected(run: Path, tmp_path: Path) -> None:
    """Catches a model that no command could run, with a message that does not say what is missing."""
    folder = Path(shutil.copytree(checkpoint_path(run / "checkpoints", 1) / "hf", tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(UserError, match=r"architecture: BertModel.*`deepcloze finetune` makes"):
        export(folder, tmp_path / "out", format="onnx")
    assert list(tmp_path.glob("*out*")) == []
