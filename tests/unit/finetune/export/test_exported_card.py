"""Cards of folders about which little is known; a whole one is in tests/multiprocess/test_hugging_face_folder.py."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from experiment.errors import HostError, UserError
from experiment.results.model_card import snippet, usage_section
from experiment.run_files.checkpoints import find_model_folder
from finetune.export.command import export_command
from finetune.export.exported_card import write_card
from finetune.options import ExportOptions

OLD = Path(__file__).parents[3] / "golden" / "checkpoint_0_1" / "step-00000002"


def export(checkpoint: str, output: str) -> None:
    export_command(ExportOptions(checkpoint=checkpoint, output=output))


def test_a_checkpoint_of_an_older_version_has_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export that fails for a checkpoint whose state lacks what newer ones record for the card, and a card
    without a title in the working directory."""
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    export(str(OLD), ".")
    card = (tmp_path / "old" / "README.md").read_text(encoding="utf-8")
    assert "\n# old\n" in card
    fingerprint = json.loads((OLD / "state.json").read_text())["identity"]["corpus.train"]
    assert f"| fingerprint | {fingerprint} |" in card
    assert "| steps | 2 |" in card
    assert "The weights are those of step 2." in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "fill-mask"
    assert "The capital of France is [MASK]." in card
    assert "optimizer.lr" in card
    assert "muon" not in card


def test_a_card_names_the_settings_that_a_resume_has_changed(tmp_path: Path) -> None:
    """Catches a recipe that cannot be repeated, because the card has the last config alone or settings whose steps were
    discarded, and a path in a card."""
    checkpoint = shutil.copytree(OLD, tmp_path / OLD.name)
    state = json.loads((checkpoint / "state.json").read_text())
    changes = [
        "corpus.eval.wiki: '/data/a' -> '/data/b'",
        "engine.ds_config: 'bf16_zero2' -> 'offload'",
        "engine.ds_config.bf16.enabled: true -> null",
        "engine.ds_config.communication_data_type: 'fp32' -> 'bf16'",
        "engine.ds_config.data_types.grad_accum_dtype: 'fp32' -> 'bf16'",
        "engine.ds_config.zero_optimization.offload_optimizer.nvme_path: null -> '/data/swap'",
        "optimizer.lr: 0.01 -> 0.001",
    ]
    attempts = [
        {"hardware": {"cpu": name}, **known}
        for name, known in {
            "Old CPU": {},
            "Kept CPU": {"step": 1000, "changes": changes},
            "Killed CPU": {"step": 1100, "changes": ["optimizer.lr: 0.001 -> 0.5"]},
            "Next CPU": {"step": 1100, "changes": ["optimizer.lr: 0.001 -> 0.6"]},
            "New CPU": {"step": 1050, "changes": []},
        }.items()
    ]
    (checkpoint / "state.json").write_text(json.dumps(state | {"provenance": {"attempts": attempts}}))
    write_card(checkpoint / "hf", tmp_path, "title")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 1,000 | optimizer.lr | 0.01 -\\> 0.001 |" in card
    assert "| 1,000 | engine.ds_config | 'bf16_zero2' -\\> 'offload' |" in card
    assert "| 1,000 | engine.ds_config.bf16.enabled | true -\\> null |" in card
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        assert f"| 1,000 | engine.ds_config.{key} | 'fp32' -\\> 'bf16' |" in card
    assert "/data/" not in card
    assert "0.001 -\\> 0." not in card
    assert re.findall(r"cores, (\w+) CPU", card) == ["Old", "Kept", "New"]


@pytest.mark.parametrize(("relation", "since"), [("fork", " since the fork"), ("init_from", "")])
def test_the_hours_of_a_fork_are_its_own(tmp_path: Path, relation: str, since: str) -> None:
    """Catches steps and tokens of a fork and its parent beside the hours of the fork alone."""
    checkpoint = shutil.copytree(OLD, tmp_path / OLD.name)
    path = checkpoint / "hf" / "deepcloze.json"
    ancestor = {"relation": relation, "folder": "/runs/parent", "run_id": "a", "step": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ancestors": [ancestor]}))
    state = json.loads((checkpoint / "state.json").read_text())
    state["progress"] |= {"seconds": 5400.0, "skipped_steps": 3}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_card(checkpoint / "hf", tmp_path, "title")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for row in ("| steps | 2 |", f"| hours{since} | 1.50 |", f"| steps without an update{since} | 3 |"):
        assert row in card


def test_a_card_of_a_fork_has_the_corpora_of_its_parents(tmp_path: Path) -> None:
    """Catches a card that leaves out most of the text that the model was trained on."""
    checkpoint = shutil.copytree(OLD, tmp_path / OLD.name)
    state = json.loads((checkpoint / "state.json").read_text())
    known = {"documents": 600, "tokens": 39843, "fingerprint": "086a" * 8, "source": "5ce2" * 8}
    state["corpora"] = {"train": [{"name": "own", "weight": 2.0, **known}]}
    state["progress"]["tokens_by_corpus"] = {"other@7db188bd": 5548, "own": 1193}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_card(checkpoint / "hf", tmp_path, "title")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\S*) \| .*\| (\S+) \| ([\d,]+) \| – \|$", card, re.MULTILINE) == [
        ("own", "100.0%", "1,193"),
        ("other@7db188bd", "–", "5,548"),
    ]
    assert "\nCorpora without a share are of the runs that this one was forked from.\n\n## Training\n" in card


def test_a_card_says_which_weights_are_averaged(tmp_path: Path) -> None:
    """Catches averages that count as the weights of their step once their folder has another name, also in the lineage
    of later models."""
    model = shutil.copytree(OLD / "hf", tmp_path / "renamed")
    path = model / "deepcloze.json"
    ancestor = {"relation": "init_from", "folder": "parent", "run_id": "a", "step": 1, "averaged": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ancestors": [ancestor], "averaged": True}))
    write_card(model, tmp_path, "title")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "The weights are those of step 2, averaged over the training." in card
    assert "| parent | 1 | a | – | averaged weights |" in card


def test_a_model_of_another_origin_has_a_card(tmp_path: Path) -> None:
    """Catches an export that fails for a folder without a head, a tokenizer or a run, and a snippet that cannot run."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=10, **shape))
    model.save_pretrained(tmp_path / "foreign")
    export(str(tmp_path / "foreign"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "A model of type bert, exported with deepcloze." in card
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert "## Usage" not in card
    assert "pipeline_tag" not in card


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.EIO, "Input/output error", "/hf/tokenizer.json"), "/hf/tokenizer.json: "),
        (Exception("Input/output error (os error 5)"), ""),
    ],
)
def test_a_disk_that_fails_changes_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, named: str
) -> None:
    """Catches a card without its usage because the tokenizer could not be read once."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(HostError, match=rf"^tokenizer: cannot load {OLD}/hf: {named}Input/output error$"):
        export(str(OLD), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_an_edited_card_is_exported_as_it_is(tmp_path: Path) -> None:
    """Catches a card written by hand that an export replaces, and one for another format that loses its text."""
    shutil.copytree(OLD / "hf", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlibrary_name: x\n---\n\n## Usage\n\nOld.\n\n## Mine\n")
    export(str(tmp_path / "mine"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == (tmp_path / "mine" / "README.md").read_text()
    write_card(tmp_path / "mine", tmp_path / "out", "out", usage_section(snippet("bash", "run")), "onnx")
    expected = "---\nlibrary_name: onnx\n---\n\n## Usage\n\n```bash\nrun\n```\n\n## Mine\n"
    assert (tmp_path / "out" / "README.md").read_text() == expected


def test_a_card_in_a_checkpoint_does_not_damage_it(tmp_path: Path) -> None:
    """Catches a checkpoint that counts as damaged because its user wrote a card for it."""
    shutil.copytree(OLD, tmp_path / OLD.name)
    (tmp_path / OLD.name / "hf" / "README.md").write_text("Mine.")
    assert find_model_folder(tmp_path / OLD.name) == tmp_path / OLD.name / "hf"
    export(str(tmp_path / OLD.name), str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "Mine."


def test_a_damaged_config_is_one_message(tmp_path: Path) -> None:
    """Catches a traceback, and a half-written export."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        export(str(tmp_path / "broken"), str(tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_a_fine_tuned_folder_without_a_card_is_no_masked_language_model(tmp_path: Path) -> None:
    """Catches the card of an encoder for a classifier that an older version has trained from it."""
    folder = tmp_path / "model"
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=10, **shape)).save_pretrained(folder)
    shutil.copyfile(OLD / "hf" / "deepcloze.json", folder / "deepcloze.json")
    export(str(folder), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "A model of type bert, exported with deepcloze." in card
    assert "## Lineage" in card


def test_a_card_that_is_not_text_is_one_message(tmp_path: Path) -> None:
    """Catches a traceback for a card in another encoding."""
    shutil.copytree(OLD / "hf", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"README\.md is not UTF-8 text"):
        export(str(tmp_path / "mine"), str(tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))
