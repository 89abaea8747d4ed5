"""A folder that `--format onnx` writes predicts what the original predicts."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from experiment.config import build_config
from experiment.errors import UserError
from experiment.files import REPOSITORY
from experiment.models.tokenizer import load_any_tokenizer
from finetune.export.command import export_command
from finetune.model import ModelSpec, build_model, save_model
from finetune.options import ExportOptions
from finetune.prediction.onnx_model import ONNX_FILE
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import SavedTask, write_saved_task
from finetune.serve.served_model import load_served_model
from finetune.task_kind import find_kind
from launcher.cli import main
from runs import soak
from tiny_models import tiny_fields

WORDS = [f"word{number}" for number in range(40)]  # of the fixture `encoder`
ExportOnnx = Callable[..., Path]
Records = list[dict[str, Any]]


def texts(count: int, longest: int = 40) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """A task and what to predict for."""

    columns: Mapping[str, Any]
    labels: tuple[str, ...]
    records: Records


PAIRS = [{"text": one, "text_pair": other} for one, other in zip(texts(12), [*texts(11), "word1"], strict=True)]
CASES = {
    "classification": Case({"label": "a", "text": "b", "text_pair": "c"}, ("x", "y", "z"), PAIRS),
    "regression": Case({"label": "a", "text": "b"}, (), [{"text": text} for text in texts(12)]),
    "embedding": Case({}, (), [{"text": text} for text in texts(12)]),
    "multi_label": Case({}, ("x", "y", "z"), [{"text": text} for text in texts(12)]),
    "token_classification": Case({}, ("O", "B-X", "I-X"), [{"words": text.split()} for text in texts(12)]),
    "question_answering": Case({}, (), [{"question": "word1 word2", "context": text} for text in texts(12, 80)]),
    "multiple_choice": Case(
        {},
        ("A", "B", "C"),
        [{"question": text, "choices": ["word3", "word4 word5", text][:n]} for n in (2, 3) for text in texts(5)],
    ),
    "cloze": Case({}, (), [{"article": f"{text} _ word1", "options": [["word3", "word4 word5"]]} for text in texts(4)]),
}


def write_model(kind_name: str, case: Case, encoder: Path, folder: Path) -> None:
    """Write the folder of a model that is not trained, with large weights, so that its predictions differ."""
    kind_type = find_kind(kind_name)
    tree = {"train": "f", "validation": "f", "columns": dict(case.columns)}
    kind = kind_type(build_config(kind_type.config_type, tree), case.labels)
    torch.manual_seed(0)
    model = build_model(ModelSpec(encoder, True, kind.auto_model, kind.head)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_model(model, load_any_tokenizer(encoder, needed=()), False, folder)
    write_saved_task(folder, SavedTask(kind, max_seq_length=24))


def assert_same(found: Any, expected: Any) -> None:
    """Compares predictions, whose numbers may differ by rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


def predictions(folder: Path, records: Records) -> Any:
    return Predictor.load(folder, "fp32", batch_size=5).predict(records)


def embeddings(folder: Path) -> list[list[float]]:
    """What the server answers for texts, mean and CLS."""
    embedders, records = load_served_model(folder, "fp32").embedders, [{"text": text} for text in texts(3)]
    return [each["embedding"] for pooling in ("mean", "cls") for each in embedders[pooling].predict(records)]


# `exported` is a classifier, and a masked language model has a test of its own. Choices have inputs of another shape.
@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("multiple_choice", None),
        *soak(("multiple_choice", "modernbert"), *((name, None) for name in CASES if name != "multiple_choice")),
    ],
)
def test_every_kind_predicts_the_same(
    name: str,
    model_type: str | None,
    encoder: Path,
    export_onnx: ExportOnnx,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches inputs or outputs of a head that are lost or mixed up, sizes that are fixed, padding that counts, hidden
    states that have another shape, positions and windows that the graph has only for the length of the example, and a
    model card whose snippet does not run."""
    case = CASES[name]
    if model_type is not None:
        write_untrained(AutoModelForMaskedLM, model_type, encoder, tmp_path / "encoder", initializer_range=0.1)
    write_model(name, case, tmp_path / "encoder" if model_type else encoder, tmp_path / "model")
    expected = predictions(tmp_path / "model", case.records)
    assert len({str(each) for each in expected}) > len(expected) // 2
    exported = export_onnx(tmp_path / "model")
    assert_same(predictions(exported, case.records), expected)
    assert_same(embeddings(exported), embeddings(tmp_path / "model"))
    assert_snippet_runs(exported, monkeypatch, capsys)


def test_the_snippet_of_the_card_runs(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a snippet that does not fit the exported model, another length than in training, and a tokenizer that
    gives no mask itself, as FNet's."""
    assert_snippet_runs(exported, monkeypatch, capsys)
    assert "truncation=True, max_length=16, " in (exported / "README.md").read_text()
    shutil.copytree(exported, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"model_input_names": ["input_ids", "token_type_ids"]}
    path.write_text(json.dumps(config))
    assert_snippet_runs(tmp_path / "model", monkeypatch, capsys)


def assert_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the model card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "onnx"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, {})
    assert re.search(r"(logits|last_hidden_state) \(", capsys.readouterr().out)  # "start_logits" too


TYPES = {
    # Positions of RoBERTa count the tokens that are no padding; only ModernBERT has rotary ones and local windows.
    "roberta": {"pad_token_id": 0, "type_vocab_size": 1, "max_position_embeddings": 66},
    "distilbert": {},
    "modernbert": {"local_attention": 12, "global_attn_every_n_layers": 2},
    "deberta-v2": {
        "num_hidden_layers": 1,  # two take seconds more to export
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
    },
    "electra": {},
    "albert": {},
    "mpnet": {},
}


def write_untrained(
    auto_model: Any, model_type: str, encoder: Path, folder: Path, initializer_range: float = 0.3
) -> None:
    """Write the folder of a tiny model of another type, with the tokenizer of `encoder`."""
    torch.manual_seed(0)
    fields = {
        **tiny_fields(model_type),
        "vocab_size": 45,
        "pad_token_id": 0,
        "initializer_range": initializer_range,
        **TYPES[model_type],
    }
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    fields |= {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    auto_model.from_config(AutoConfig.for_model(model_type, **fields)).save_pretrained(folder)
    load_any_tokenizer(encoder, needed=()).save_pretrained(folder)


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_other_architectures(model_type: str, encoder: Path, export_onnx: ExportOnnx, tmp_path: Path) -> None:
    """Catches positions, windows and relative distances that the graph has only for the length of the example."""
    write_untrained(AutoModelForSequenceClassification, model_type, encoder, tmp_path / "model")
    records = [{"text": text} for text in [*texts(8), "word1 " * 100]]
    assert_same(predictions(export_onnx(tmp_path / "model"), records), predictions(tmp_path / "model", records))


@pytest.fixture(scope="module")
def exported(trained_run: Path, export_onnx: ExportOnnx) -> Path:
    """The best seed of `trained_run`."""
    return export_onnx(trained_run)


@pytest.fixture(scope="module")
def int8(exported: Path, trained_run: Path, export_onnx: ExportOnnx) -> Path:
    """The same in int8, of the same graph, which takes seconds to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "finetune.export.onnx_folder.write_graph", lambda _, path: shutil.copy(exported / ONNX_FILE, path)
        )
        return export_onnx(trained_run, int8=True)


def test_the_folder_has_no_path_of_the_machine(exported: Path, trained_run: Path) -> None:
    """Catches the user's folders in a model that is published: torch.onnx writes stack traces into the graph."""
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(trained_run.parent).encode() not in content, path.name
        assert str(REPOSITORY).encode() not in content, path.name
        assert sys.prefix.encode() not in content, path.name


def predict(model: Path, source: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    """The rows that `deepcloze predict` writes."""
    assert main(["predict", "--model", str(model), "--input", str(source), "--output", str(output), *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_predict_writes_the_same_rows(exported: Path, trained_run: Path, tmp_path: Path) -> None:
    """Catches a task, labels or a temperature that do not travel with the model."""
    source = trained_run.parent / "test.tsv"
    found = predict(exported, source, tmp_path / "a.jsonl", "--calibrated", "--score")
    expected = predict(trained_run, source, tmp_path / "b.jsonl", "--calibrated", "--score", "--precision=fp32")
    assert_same(found, expected)
    scores = [json.loads((tmp_path / f"{name}.scores.json").read_text())["scores"] for name in "ab"]
    assert_same(*scores)


def test_int8_predicts_about_the_same(int8: Path, trained_run: Path, tmp_path: Path) -> None:
    """Catches weights that are quantized with the wrong scales, and files that stay because they are not."""
    source = trained_run.parent / "test.tsv"
    found = predict(int8, source, tmp_path / "a.jsonl")
    expected = predict(trained_run, source, tmp_path / "b.jsonl", "--precision=fp32")
    for row, other in zip(found, expected, strict=True):
        assert row["predicted"] == other["predicted"]
        assert row["probability_high"] == pytest.approx(other["probability_high"], abs=0.1)
    tensors = onnx.load(int8 / ONNX_FILE).graph.initializer
    in_fp32 = [each.name for each in tensors if each.data_type == onnx.TensorProto.FLOAT and min([*each.dims, 1]) > 1]
    assert [name for name in in_fp32 if not re.search("pooler|classifier", name)] == []


def test_embeddings_are_rounded_by_half_a_step_at_most(int8: Path, trained_run: Path) -> None:
    """Catches the largest element of a row that overflows."""
    weights = load_file(trained_run / "seed-1" / "model" / "model.safetensors")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(int8 / ONNX_FILE).graph.initializer}
    tables = {name.removesuffix("_int8") for name in stored if name.endswith("_int8")}
    assert len(tables) > 1
    for name in tables:
        scale = stored[f"{name}_scale"]
        restored = stored[f"{name}_int8"] * scale
        assert (np.abs(restored - weights[name.removeprefix("model.")].numpy()) <= 0.501 * scale).all(), name


def test_the_server_says_that_it_computes_in_int8(int8: Path) -> None:
    """Catches a precision of PyTorch that is shown for a model that has another."""
    served = load_served_model(int8, "auto")
    assert (served.info.precision, served.info.labels) == ("int8", ["high", "low"])


def test_a_masked_language_model(
    encoder: Path, export_onnx: ExportOnnx, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an output layer in fp32, which is half of a small masked language model, chatter of torch.onnx, and a
    server that needs what only PyTorch has, such as hooks in the output layer, or hidden states of another shape."""
    exported = export_onnx(encoder)
    printed = capfd.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == ["PyTorch", "ONNX"]
    assert printed.err == ""
    original, served = load_served_model(encoder, "fp32"), load_served_model(exported, "fp32")
    masked = ["word1 [MASK] word2", "[MASK] word3 word4 [MASK]"]
    assert_same(served.filler.fill(masked, top_k=3), original.filler.fill(masked, top_k=3))
    record = original.filler.option_record(masked[1], [["word1", "word2 word5"], ["word8", "word9"]], "text")
    rankings = (served.filler.ranking, original.filler.ranking)
    assert_same(*(each.predict_split(each.encode([record])) for each in rankings))
    assert_same(embeddings(exported), embeddings(encoder))
    same = {"model": "", "loaded": ""}
    assert served.info.model_copy(update=same) == original.info.model_copy(update=same)

    monkeypatch.setattr(
        "finetune.export.onnx_folder.write_graph", lambda _, path: shutil.copy(exported / ONNX_FILE, path)
    )
    model = onnx.load(export_onnx(encoder, int8=True) / ONNX_FILE)
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and "weight" in node.input[0]]
    shapes = [tuple(each.dims) for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert {(45, 32), (32, 45)} <= set(shapes)


def test_a_model_that_depends_on_padding(
    convolutions: Path, export_onnx: ExportOnnx, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches texts of different lengths that int8 computes in one batch, and a snippet that pads them."""
    exported = export_onnx(convolutions, int8=True)
    filler = load_served_model(exported, "auto").filler
    masked = ["word1 [MASK]", "[MASK] word2 word3 word4 word5 word6 word7"]
    assert filler.fill(masked) == [filler.fill([text])[0] for text in masked]
    assert 'texts = ["A text."]  # ' in (exported / "README.md").read_text()
    assert_snippet_runs(exported, monkeypatch, capsys)


def test_the_folder_has_all_but_the_weights(exported: Path, int8: Path, trained_run: Path) -> None:
    """Catches weights that are copied too, and files that are left behind, such as the fp32 model of an int8 one."""
    trained = {path.name for path in (trained_run / "seed-1" / "model").iterdir()}
    expected = trained - {"model.safetensors"} | {ONNX_FILE}
    for folder in (exported, int8):
        assert {path.name for path in folder.iterdir()} == expected
        assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_sizes_and_differences_are_printed(
    exported: Path,
    trained_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches an export that says nothing about what it found, or says that all predictions are the same because they
    are for random tokens; and a license that is left out."""
    model = Path(shutil.copytree(trained_run / "seed-1" / "model", tmp_path / "model"))
    (model / "LICENSE.txt").write_text("Be kind.")
    monkeypatch.setattr(
        "finetune.export.onnx_folder.write_graph", lambda _, path: shutil.copy(exported / ONNX_FILE, path)
    )
    export_command(ExportOptions(checkpoint=str(model), output=str(tmp_path / "out"), format="onnx", int8=True))
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].endswith(f"-> {tmp_path / 'out'}")
    assert re.match(r"PyTorch +\d+\.\d MB  largest differences from it, on 32 texts of up to 64 tokens:", lines[1])
    numbers = r"logits \d\.\de-\d\d of \d.*, last_hidden_state \d\.\de-\d\d of \d[^,]*"
    for name, line in zip(("fp32", "int8"), lines[2:], strict=True):
        assert re.fullmatch(rf"ONNX {name} +\d+\.\d MB  {numbers}", line)
    assert printed.err == ""
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Be kind."


def test_outputs_that_differ_are_an_error(
    int8: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that is written although it computes something else: here what int8 makes of it."""
    monkeypatch.setattr("finetune.export.onnx_folder.write_graph", lambda _, path: shutil.copy(int8 / ONNX_FILE, path))
    with pytest.raises(UserError, match=r"logits of ONNX Runtime differ from those of PyTorch by up to .*e-\d\d"):
        export_command(ExportOptions(checkpoint=str(trained_run), output=str(tmp_path / "out"), format="onnx"))
    assert list(tmp_path.glob("*out*")) == []


def test_a_model_that_cannot_be_exported(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of torch.export or the graph that it prints, which have hundreds of lines."""

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0] if hidden.sum() > 0 else -hidden[:, 0]

    monkeypatch.setattr("transformers.models.bert.modeling_bert.BertPooler.forward", forward)
    with pytest.raises(UserError, match=r"torch.onnx cannot export this bert model: .*data-dependent") as caught:
        export_command(ExportOptions(checkpoint=str(trained_run), output=str(tmp_path / "out"), format="onnx"))
    assert "\n" not in str(caught.value)
    assert [*capfd.readouterr()] == ["", ""]
    assert list(tmp_path.glob("*out*")) == []


def test_a_model_that_is_too_large_for_int8(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a refusal after minutes of tracing, and a limit that is not the one that counts."""
    monkeypatch.setattr("finetune.export.graph._MOST_BYTES", 2**10)
    monkeypatch.delattr("finetune.export.onnx_folder.write_graph")
    message = r"^--int8: the model has 0\.00 GiB of weights in fp32; at most .* GiB can be quantized$"
    with pytest.raises(UserError, match=message):
        export_command(
            ExportOptions(checkpoint=str(trained_run), output=str(tmp_path / "out"), format="onnx", int8=True)
        )
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_another_precision_is_rejected(precision: str, exported: Path, int8: Path) -> None:
    """Catches a precision that is ignored."""
    for folder, name in ((exported, "fp32"), (int8, "int8")):
        with pytest.raises(UserError, match=f"--precision: the ONNX model in .* computes in {name} only; use auto"):
            Predictor.load(folder, precision)


def test_an_onnx_model_is_not_exported_again(exported: Path, tmp_path: Path) -> None:
    """Catches an error about missing weights that does not say why, and a Hugging Face folder without weights."""
    source, output = str(exported), str(tmp_path / "out")
    as_onnx = ExportOptions(checkpoint=source, output=output, format="onnx", int8=True)
    for options in (as_onnx, ExportOptions(checkpoint=source, output=output)):
        with pytest.raises(UserError, match="holds an ONNX model already"):
            export_command(options)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_used(exported: Path, trained_run: Path, tmp_path: Path) -> None:
    """Catches a traceback of ONNX Runtime, and an ONNX file that takes the place of weights beside it."""
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    (damaged / ONNX_FILE).write_bytes((exported / ONNX_FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.onnx is damaged: "):
        Predictor.load(damaged)
    foreign = onnx.load(exported / ONNX_FILE)
    del foreign.metadata_props[:]
    onnx.save(foreign, damaged / ONNX_FILE)
    with pytest.raises(UserError, match=r"model\.onnx was not written by `deepcloze export`"):
        Predictor.load(damaged)
    shutil.copy(trained_run / "seed-1" / "model" / "model.safetensors", damaged)
    assert Predictor.load(damaged, "fp32").predict([{"text": "word1"}])
