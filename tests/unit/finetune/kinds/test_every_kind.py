"""What all kinds of tasks have in common: each learns a tiny task, saves a model that transformers opens, and its
predictions do not depend on the batch."""

import ast
import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from experiment.config import build_config
from experiment.models.tokenizer import load_any_tokenizer
from finetune.config import FinetuneConfig
from finetune.data.columns import TextColumns
from finetune.data.records import read_table
from finetune.data.splits import read_splits
from finetune.device import Device, MicrobatchSize
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Padding
from finetune.inference import Inference, collate, decode
from finetune.kinds import kind_names
from finetune.model import ModelSpec, build_model
from finetune.model_trial import computes
from finetune.prediction.predictor import Predictor
from finetune.prepared_task import encode_split, make_kind
from finetune.results.seed_summary import SeedRecord
from finetune.results.tables import print_results
from finetune.run import run
from finetune.task_kind import find_kind
from runs import soak
from simulated_gpu.gpu import simulated_gpu

pytestmark = pytest.mark.usefixtures("no_figures")
LOW, HIGH = [f"word{n}" for n in range(20)], [f"word{n}" for n in range(20, 40)]
Row = dict[str, Any]


@dataclass(frozen=True)
class TinyTask:
    """Rows that a tiny model learns in seconds."""

    row: Callable[[random.Random], Row]
    chance: float  # score of guessing
    epochs: int = 3
    lr: float = 1e-2
    task: dict[str, Any] = field(default_factory=dict)  # keys of its config


def words(draw: random.Random, low: int, high: int) -> list[str]:
    """Words of the two halves of the vocabulary, in any order."""
    found = draw.choices(LOW, k=low) + draw.choices(HIGH, k=high)
    draw.shuffle(found)
    return found


def classification(draw: random.Random) -> Row:
    high = draw.random() < 0.5
    return {"label": "high" if high else "low", "sentence1": " ".join(words(draw, 6 * (not high), 6 * high))}


def regression(draw: random.Random) -> Row:
    low, high = draw.randint(0, 4), draw.randint(1, 4)
    return {"label": high / (low + high), "sentence1": " ".join(words(draw, low, high))}


def multi_label(draw: random.Random) -> Row:
    low, high = draw.randint(0, 1), draw.randint(0, 1)
    labels = ["low"] * low + ["high"] * high
    return {"labels": labels, "text": " ".join(words(draw, low * 3, high * 3) or ["word0 word20"])}


def multiple_choice(draw: random.Random) -> Row:
    choices = [draw.choice(LOW) for _ in range(draw.randint(2, 4))]
    label = draw.randrange(len(choices))
    choices[label] = draw.choice(HIGH)
    return {"question": " ".join(words(draw, 1, 1)), "choices": choices, "label": "ABCD"[label]}


def token_classification(draw: random.Random) -> Row:
    """An entity is a word of the upper half followed by up to two word19; long sentences need windows."""
    found: list[tuple[str, str]] = []
    for _ in range(draw.randint(1, 15)):
        if draw.random() < 0.3:
            found += [(draw.choice(HIGH), "B-NAME")] + [("word19", "I-NAME")] * draw.randint(0, 2)
        else:
            found.append((draw.choice(LOW[:19]), "O"))
    return {"tokens": [word for word, _ in found], "tags": [tag for _, tag in found]}


def question_answering(draw: random.Random) -> Row:
    """The answer are the words of the upper half, in a context that may need windows."""
    before, answer, after = (
        draw.choices(part, k=draw.randint(1, 12 if part is LOW else 3)) for part in (LOW, HIGH, LOW)
    )
    text = " ".join(answer)
    answers = {"text": [text], "answer_start": [len(" ".join(before)) + 1]}
    return {"question": "word0 word1", "context": " ".join([*before, *answer, *after]), "answers": answers}


def cloze(draw: random.Random) -> Row:
    """The right option is of the upper half; options have one or two tokens, and the article needs windows."""
    blanks = draw.randint(1, 4)
    options = [[" ".join(draw.choices(LOW, k=draw.randint(1, 2))) for _ in range(4)] for _ in range(blanks)]
    answers = [draw.randrange(4) for _ in range(blanks)]
    for row, answer in zip(options, answers, strict=True):
        row[answer] = draw.choice(HIGH)
    texts = [" ".join(draw.choices(LOW, k=draw.randint(1, 9))) for _ in range(blanks + 1)]
    return {"article": " _ ".join(texts), "options": options, "answers": ["ABCD"[answer] for answer in answers]}


def embedding(draw: random.Random) -> Row:
    """Texts are similar if they have as many words of the upper half."""
    high, other = draw.randint(0, 4), draw.randint(0, 4)
    texts = [" ".join(words(draw, 4 - number, number)) for number in (high, other)]
    return {"sentence1": texts[0], "sentence2": texts[1], "score": 4 - abs(high - other)}


TASKS = {
    "classification": TinyTask(classification, chance=0.6),
    "regression": TinyTask(regression, chance=0.3, epochs=6),
    "multi_label": TinyTask(multi_label, chance=0.6, epochs=5),
    "token_classification": TinyTask(token_classification, chance=0.8),
    "question_answering": TinyTask(question_answering, chance=0.5),
    "cloze": TinyTask(cloze, chance=0.4, epochs=1, lr=5e-3),  # a row has many examples
    "multiple_choice": TinyTask(multiple_choice, chance=0.5),
    "embedding": TinyTask(embedding, chance=0.4, task={"columns": {"score": "score"}}),
}


LABELLED = ("classification", "multi_label", "token_classification")


def config_of(name: str, encoder: Path, folder: Path, rows: int = 40, **training: Any) -> FinetuneConfig:
    """The config of a run on a tiny task, whose files are written to the folder: `rows` of a test."""
    tiny = TASKS[name]
    files = {}
    for seed, (split, count) in enumerate({"train": 4 * rows, "validation": rows, "test": rows}.items()):
        draw = random.Random(seed)
        files[split] = str(folder / f"{split}.jsonl")
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(tiny.row(draw)) + "\n" for _ in range(count)))
    tree = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": name, "kind": name, **files, **tiny.task},
        "model": {"init_from": str(encoder), "max_seq_length": 24},
        "training": {"lr": tiny.lr, "epochs": tiny.epochs, "batch_size": 16, "precision": "fp32", **training},
    }
    return build_config(FinetuneConfig, tree, {})


def numbers(prediction: Any) -> list[float]:
    """All numbers in a prediction, at any depth."""
    if isinstance(prediction, dict):
        prediction = list(prediction.values())
    if isinstance(prediction, list | np.ndarray):
        return [number for part in prediction for number in numbers(part)]
    return [float(prediction)] if isinstance(prediction, int | float | np.floating) else []


def test_every_kind_has_a_tiny_task() -> None:
    """Catches a new kind that the tests below do not know."""
    assert sorted(TASKS) == kind_names()


@pytest.mark.parametrize("name", TASKS)
def test_a_kind_learns_and_saves_what_it_learned(
    encoder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches targets, losses or decoding that do not fit together, a saved model that is not the one scored, a kind
    without a list of its worst rows or a table of its labels, a metric that is accepted but not scored, scores of other
    records than a bootstrap draws, and a model card whose snippet does not run."""
    config = config_of(name, encoder, tmp_path, score_train=True)
    results = run(config)
    assert results["splits"]["train"][config.task.metric]["mean"] > TASKS[name].chance
    score = results["splits"]["test"][config.task.metric]["mean"]
    assert score > TASKS[name].chance
    of_others = ("mrr", "ndcg@10") if name == "embedding" else ()  # of pairs without scores
    assert list(results["splits"]["test"]) == [each for each in find_kind(name).metrics() if each not in of_others]
    folder = tmp_path / "run" / "seed-42"
    predictor = Predictor.load(folder / "model", precision="fp32")
    auto = getattr(transformers, predictor.kind.auto_model)
    _, report = auto.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    table = read_table(Path(str(config.task.test)), config.task.columns)
    predictions = predictor.kind.relate(table.records, predictor.predict_split(predictor.encode(table.records)))
    assert predictor.kind.scores(table.records, predictions)[config.task.metric] == pytest.approx(score)
    rows = np.random.default_rng(0).integers(0, len(table), size=len(table))
    drawn = [table.records[row] for row in rows], [predictions[row] for row in rows]
    scored = predictor.kind.scorer(table.records, predictions)(rows)
    assert scored == pytest.approx(predictor.kind.scores(*drawn), rel=1e-12)
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "worst-test.csv").open())]
    assert losses == sorted(losses, reverse=True)
    assert 0 <= losses[-1] < losses[0]
    print_results(results, folder)
    assert ("support" in capsys.readouterr().out) == (name in LABELLED)
    record = SeedRecord(**json.loads((folder / "COMPLETE").read_text()))
    assert not record.collapsed
    monkeypatch.chdir(folder / "model")
    library = predictor.kind.library.replace("-", "_")
    pytest.importorskip(library, reason=f"{library} is not installed: the snippet of the model card needs it")
    found = run_snippet(folder / "model", capsys)
    if name == "token_classification":
        text = " ".join([*LOW * 4, HIGH[0]])
        printed = print_with_snippet(folder / "model", capsys, {"A sentence.": text})
        assert f"'end': {len(text)}}}]" in printed, "the end of a long text"
    if issubclass(find_kind(name).config_type.model_fields["columns"].annotation, TextColumns):
        (prediction,) = predictor.predict([{"text": "A text."}])
        expected = numbers(prediction)
        assert max(numbers(found)) == pytest.approx(max(expected), abs=1e-4)


def print_with_snippet(model: Path, capsys: pytest.CaptureFixture[str], inputs: dict[str, str]) -> str:
    """What the Python in a model card prints, with other inputs. The working directory is the model folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for shown, text in inputs.items():
        code = code.replace(shown, text)
    capsys.readouterr()
    exec(code, {})
    printed = capsys.readouterr().out.strip()
    assert printed
    return printed


def run_snippet(model: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the Python in a model card prints, as a value if it is one."""
    printed = print_with_snippet(model, capsys, {})
    return ast.literal_eval(printed) if printed.startswith(("[", "{")) else printed


def test_a_regression_starts_at_the_mean_of_its_targets(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a new head at 0, from which targets of 50 to 90 take thousands of updates to reach, one that differs
    between seeds, and the head of an earlier task that is changed."""
    far = TinyTask(lambda draw: {**(row := regression(draw)), "label": 50 + 40 * row["label"]}, chance=0.0, lr=1e-9)
    monkeypatch.setitem(TASKS, "regression", far)
    config = config_of("regression", encoder, tmp_path, rows=8, steps=1, seeds=[1, 2])
    assert all(value < 20 for value in run(config)["splits"]["test"]["mae"]["values"])
    path = tmp_path / "train.jsonl"
    mean = np.mean([json.loads(line)["label"] for line in path.read_text().splitlines()])
    first, second = (
        load_file(tmp_path / "run" / seed / "model" / "model.safetensors") for seed in ("seed-1", "seed-2")
    )
    assert first["classifier.bias"].item() == pytest.approx(mean)
    assert first["classifier.bias"].item() == pytest.approx(second["classifier.bias"].item())
    path.write_text(json.dumps({"label": 1.0, "sentence1": "word1"}) + "\n")
    start = config.model.model_copy(update={"init_from": str(tmp_path / "run" / "seed-1" / "model")})
    again = config.run.model_copy(update={"dir": str(tmp_path / "again")})
    run(config.model_copy(update={"model": start, "run": again}))
    kept = load_file(tmp_path / "again" / "seed-1" / "model" / "model.safetensors")
    assert kept["classifier.bias"].item() == pytest.approx(mean)


@pytest.mark.parametrize("factor", [1e-3, 1e12])
def test_a_regression_learns_in_units_of_its_targets(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Catches large targets whose predictions stay near the mean, because an update moves a weight as far as for
    targets between 0 and 1, or whose gradients overflow, small ones that drown in the first outputs, and a saved model
    that predicts something else than was scored."""
    wide = TinyTask(lambda draw: {**(row := regression(draw)), "label": factor * row["label"]}, chance=0.0, epochs=6)
    monkeypatch.setitem(TASKS, "regression", wide)
    results = run(config_of("regression", encoder, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    (error,) = results["splits"]["test"]["rmse"]["values"]
    assert error < 0.9 * np.std(labels)
    found = Predictor.load(tmp_path / "run" / "seed-42" / "model", precision="fp32").predict(
        [{"text": row["sentence1"]} for row in rows]
    )
    errors = [each["value"] - label for each, label in zip(found, labels, strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(error, rel=1e-3)


def test_the_snippet_of_a_task_on_pairs_runs(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a snippet that gives a model of pairs a single text, or joins the two in another way than training."""
    pairs = TinyTask(lambda draw: {**classification(draw), "other": "word1"}, chance=0, epochs=1)
    monkeypatch.setitem(TASKS, "classification", pairs)
    config = config_of("classification", encoder, tmp_path, rows=8)
    columns = config.task.columns.model_copy(update={"text_pair": "other"})
    run(config.model_copy(update={"task": config.task.model_copy(update={"columns": columns})}))
    model = tmp_path / "run" / "seed-42" / "model"
    monkeypatch.chdir(model)
    found = run_snippet(model, capsys)
    record = {"text": "A text.", "text_pair": "Another text."}
    (prediction,) = Predictor.load(model, precision="fp32").predict([record])
    assert max(numbers(found)) == pytest.approx(max(numbers(prediction)), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "columns", "answer"),
    [
        ("question_answering", {}, {"answer": "", "start": None}),
        ("multiple_choice", {}, {}),
        ("multiple_choice", {"question": None, "context": "article"}, {}),
    ],
)
def test_snippets_predict_as_scored(
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    columns: dict[str, Any],
    answer: dict[str, Any],
) -> None:
    """Catches a snippet that finds an answer where there is none, cuts another part of a context, or gives a model a
    question though it was trained on contexts."""
    row = TASKS[name].row
    options = {"columns": columns} | ({"no_answer": True} if answer else {})

    def other(draw: random.Random) -> Row:
        unanswered = {"answers": {"text": [], "answer_start": []}} if answer else {}
        return {"article": "word1 word2", **row(draw), **unanswered}

    monkeypatch.setitem(TASKS, name, TinyTask(other, chance=0.0, epochs=1, task=options))
    run(config_of(name, encoder, tmp_path, rows=8))
    model = tmp_path / "run" / "seed-42" / "model"
    monkeypatch.chdir(model)
    (found,) = run_snippet(model, capsys)
    texts = {"question": "Which one is right?", "context": "A text."}
    if name == "multiple_choice":
        record = {role: text for role, text in texts.items() if columns.get(role, role != "context")}
        (expected,) = Predictor.load(model).predict([record | {"choices": ["This one.", "That one."]}])
        assert found == expected
    else:
        assert {key: found[key] for key in answer} == answer


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in TASKS if name not in ("classification", "token_classification")),
        ("token_classification", "bf16"),
        ("classification", "fp16"),
        *soak(("classification", "fp32"), ("token_classification", "fp32")),
    ],
)
def test_a_gpu_computes_what_a_cpu_does(encoder: Path, tmp_path: Path, name: str, precision: str) -> None:
    """Catches tensors on the wrong device in training, in the saved state, or when a saved model predicts."""
    pytest.importorskip("triton", reason="the simulated GPU needs Triton")
    start = Path(shutil.copytree(encoder, tmp_path / "start"))
    # Devices draw other dropout masks.
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = json.loads((start / "config.json").read_text()) | without_dropout
    (start / "config.json").write_text(json.dumps(config))

    def predict(device: str) -> list[float]:
        folder = tmp_path / device
        folder.mkdir()
        computed_in = precision if device == "gpu" else "fp32"
        options = {"steps": 2, "evaluate_every": 1, "precision": computed_in, "score_train": True}
        config = config_of(name, start, folder, rows=4, **options)
        run(config)
        predictor = Predictor.load(folder / "run", precision=computed_in)
        table = read_table(Path(str(config.task.test)), config.task.columns)
        return numbers(predictor.predict_split(predictor.encode(table.records)))

    expected = predict("cpu")
    with simulated_gpu() as gpu:
        found = predict("gpu")
    assert (gpu.mixed, gpu.races) == ([], [])
    assert found == pytest.approx(expected, abs=1e-4 if precision == "fp32" else 0.1)


@pytest.mark.parametrize(
    "task", [*({"kind": name} for name in TASKS), {"kind": "cloze", "scoring": "zero_shot"}], ids=lambda task: str(task)
)
def test_the_probe_can_be_computed(encoder: Path, task: dict[str, str]) -> None:
    """Catches a precision that is given up, or kept, because of inputs that the model cannot compute in any."""
    tree = {"run": {"dir": "r"}, "task": {"train": "f", "test": "f", **task}, "model": {"init_from": "m"}}
    config = build_config(FinetuneConfig, tree, {}).task
    kind = find_kind(task["kind"])(config, ("a", "b"))
    model = build_model(ModelSpec(encoder, True, kind.auto_model, kind.head)).model.eval()
    tokenizer = load_any_tokenizer(encoder, needed=())
    probe = kind.probe(Encoder(tokenizer, 24, token_types=True))
    device = Device(torch.device("cpu"), None)
    assert computes(model, kind, collate(kind, [probe], Padding.of(tokenizer), device.torch_device), device)


@pytest.mark.parametrize("name", TASKS)
def test_records_are_encoded_together(
    encoder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches texts that are encoded one by one, which takes twice the time."""
    config = config_of(name, encoder, tmp_path, rows=12)
    tables = read_splits(config.task, None)
    calls, encode_all = [], Encoder.encode_all
    monkeypatch.setattr(Encoder, "encode_all", lambda *arguments: calls.append(1) or encode_all(*arguments))
    made = Encoder(load_any_tokenizer(encoder, needed=()), 24, token_types=True)
    kind = make_kind(config.task, tables)
    split = encode_split(tables["test"], kind, made, training=False)
    assert len(split.table) > 10
    assert len(calls) == bool(kind.encoded_texts(tables["test"].records[0]))


@pytest.mark.parametrize("name", TASKS)
def test_predictions_do_not_depend_on_the_batch(encoder: Path, tmp_path: Path, name: str) -> None:
    """Catches padding that takes part in what is computed, and outputs of a batch given to the wrong sequence."""
    config = config_of(name, encoder, tmp_path)
    tables = read_splits(config.task, None)
    kind = make_kind(config.task, tables)
    model = build_model(ModelSpec(encoder, True, kind.auto_model, kind.head)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # of an untrained model, so that its predictions differ
    tokenizer = load_any_tokenizer(encoder, needed=())
    split = encode_split(tables["test"], kind, Encoder(tokenizer, 24, token_types=True), training=False)
    found = []
    for batch_size in (1, 7):
        inference = Inference(
            model, kind, Padding.of(tokenizer), Device(torch.device("cpu"), None), MicrobatchSize(batch_size)
        )
        outputs, _ = inference.compute(split.examples)
        found.append(decode(kind, split, outputs))
    alone, together = found
    if kind.answer not in ("value", "embedding"):
        assert [prediction[kind.answer] for prediction in together] == [prediction[kind.answer] for prediction in alone]
    assert numbers(list(together)) == pytest.approx(numbers(list(alone)), abs=1e-4)
    assert len({str(prediction) for prediction in alone}) > 10
