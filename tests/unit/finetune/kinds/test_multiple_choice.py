import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMultipleChoice

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.config import FinetuneConfig
from finetune.data.records import Record, Table, read_table
from finetune.data_report import data_warnings
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Padding
from finetune.inference import collate
from finetune.kinds.multiple_choice import Config, Kind, MultipleChoiceColumns
from finetune.model import ModelSpec, read_model_inputs
from finetune.prepared_task import make_kind
from finetune.scores.calibration import calibration_error
from finetune.task_kind import LossOptions

CHOICES = ["word1", "word2", "word3", "word4"]


def config(**keys: Any) -> Config:
    columns = MultipleChoiceColumns(context="context")
    return Config(train="f", validation="f", columns=columns, **keys)


def record(choices: list[str] = CHOICES, **values: Any) -> Record:
    return Record("f.csv:2", {"context": "word10 word11", "question": "word20", "choices": choices, **values})


def find(*labels: str, choices: list[str] = CHOICES, **keys: Any) -> tuple[str, ...]:
    records = tuple(record(choices, label=label) for label in labels)
    return make_kind(config(**keys), {"train": Table(Path("f.csv"), records, labelled=True)}).labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("0", "3"), ("0", "1", "2", "3")),
        (("1", "4"), ("1", "2", "3", "4")),
        (("A", "D"), ("A", "B", "C", "D")),
        (("b", "a"), ("a", "b", "c", "d")),
        (("word4", "word1"), ()),
    ],
)
def test_the_notation_of_the_labels_is_found(labels: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Catches numbers from 1 read as numbers from 0: every answer would be the wrong one."""
    assert find(*labels) == expected
    kind = Kind(config(), expected)
    encoder_ids = [kind._choice_id(record(label=label)) for label in labels]
    assert encoder_ids == [(expected or tuple(CHOICES)).index(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "choices", "message"),
    [
        (("1", "2"), CHOICES, r"'0', '1', … or '1', '2', … of the choices; set task\.labels"),
        (("1", "4"), ["1", "2", "3", "4"], r"the texts or '1', '2', … of the choices; set task\.labels"),
        (("0", "B"), CHOICES, r"f\.csv:2: the label 'B' is not the number, letter or text"),
        (("E",), CHOICES, r"the label 'E' is not the number, letter or text"),
    ],
)
def test_an_unclear_notation_is_rejected(labels: tuple[str, ...], choices: list[str], message: str) -> None:
    """Catches a guess where the labels do not say what they count from."""
    with pytest.raises(UserError, match=message):
        find(*labels, choices=choices)


def test_labels_that_are_texts_are_not_odd() -> None:
    """Catches a warning that most labels occur once, which the right choices of any questions do."""
    records = tuple(
        Record("f", {"question": f"question {n}?", "choices": [f"x{n}", f"y{n}"], "label": f"x{n}"}) for n in range(9)
    )
    tables = {"train": Table(Path("f"), records, labelled=True)}
    assert data_warnings(tables, Kind(Config(), ())) == []


def test_space_around_a_choice_does_not_matter() -> None:
    """Catches files that cannot be used because labels are read without the space around them."""
    choices = ["yes ", " no"]
    assert find("yes", "no", choices=choices) == ()
    Kind(config(), ()).check_target(record(choices, label="yes"))


def test_labels_may_name_the_choices() -> None:
    """Catches task.labels being ignored."""
    assert find("1", "2", labels=("1", "2", "3", "4")) == ("1", "2", "3", "4")


def test_each_row_may_name_its_choices(tmp_path: Path, encoder: Path) -> None:
    """Catches ARC and CommonsenseQA, which have names beside the texts, being rejected, or answered by the texts."""
    rows = [(["A", "B", "C"], "B"), (["1", "2"], "1"), ([1, 2, 3, 4], 4)]
    cells = [{"label": names, "text": CHOICES[: len(names)]} for names, _ in rows]
    path = tmp_path / "f.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": "word20", "choices": choices, "label": label}) + "\n"
            for choices, (_, label) in zip([cells[0], json.dumps(cells[1]), cells[2]], rows, strict=True)
        )
    )
    table = read_table(path, MultipleChoiceColumns())
    kind = make_kind(Config(train="f", validation="f"), {"train": table})
    assert [kind.expand(found, encode(encoder), training=True)[0].target for found in table.records] == [1, 0, 3]
    assert [kind.count_options(found) for found in table.records] == [3, 2, 4]
    assert list(kind.evaluated_texts(table.records[1])) == ["word1", "word2", "word20"]
    predictions = [
        kind.decode(found, [], list(np.eye(n)[target][:, None].astype(np.float32)))
        for found, n, target in zip(table.records, (3, 2, 4), (1, 1, 3), strict=True)
    ]
    assert [prediction["label"] for prediction in predictions] == ["B", "2", "4"]
    assert kind.scores(table.records, predictions) == {"accuracy": pytest.approx(2 / 3)}
    assert table.records[0].values["choices"] == dict(zip("ABC", CHOICES, strict=False)), "names are in the digest"
    path.write_text(json.dumps({"question": "word20", "choices": cells[0], "label": "D"}))
    with pytest.raises(UserError, match=r"f\.jsonl:1: the label 'D' is not a choice; the choices: A, B, C"):
        kind.check_target(read_table(path, MultipleChoiceColumns()).records[0])


@pytest.mark.parametrize(
    ("labels", "choices", "label", "message"),
    [
        (("A", "B", "C"), CHOICES[:2], "C", r"f\.csv:2: the label 'C' is not a choice; the choices: A, B"),
        ((), ["x", "x", "y"], "x", r"the label 'x' is the text of several choices"),
        (("A", "B", "C"), CHOICES, "C", r"4 choices, but only 3 labels"),
        (("A", "B", "C"), ["x"], "A", r"expected two or more choices"),
    ],
)
def test_a_label_that_is_no_choice_is_rejected(
    encoder: Path, labels: tuple[str, ...], choices: list[str], label: str, message: str
) -> None:
    """Catches an index error during training, and a choice picked at random among equal ones."""
    with pytest.raises(UserError, match=message):
        Kind(config(), labels).expand(record(choices, label=label), encode(encoder), training=True)


def encode(folder: Path, max_length: int = 64) -> Encoder:
    return Encoder(load_tokenizer(folder), max_length, token_types=True)


@pytest.mark.parametrize(
    ("side", "max_length", "ids"),
    [
        ("right", 9, [2, 15, 16, 3, 25, 6, 3]),
        ("right", 6, [2, 15, 3, 25, 6, 3]),
        ("left", 6, [2, 16, 3, 25, 6, 3]),
        ("right", 5, [2, 3, 25, 6, 3]),
        ("left", 5, [2, 3, 25, 6, 3]),
    ],
)
def test_question_and_choice_are_kept(encoder: Path, side: str, max_length: int, ids: list[int]) -> None:
    """Catches a choice that is cut off: all choices would look the same."""
    kind = Kind(config(truncation_side=side), ())
    first = kind.expand(record(), encode(encoder, max_length), training=False)[0].sequences[0]
    assert first.input_ids.tolist() == ids
    assert first.cut == max(7 - max_length, 0)


def test_the_loss_of_a_batch_is_that_of_its_questions(encoder: Path) -> None:
    """Catches a softmax over all choices of a batch: the reference computes each question by itself, as transformers
    does."""
    kind = Kind(config(), ("A", "B", "C", "D"))
    torch.manual_seed(0)
    model = BertForMultipleChoice.from_pretrained(encoder).eval()
    records = [record(label="B"), record(CHOICES[:2], label="A"), record(CHOICES[1:], label="C")]
    made = [kind.expand(each, encode(encoder), training=True)[0] for each in records]
    cpu = torch.device("cpu")
    batch = collate(kind, made, Padding(0, "right", 0), cpu)
    with torch.no_grad():
        found = kind.loss(kind.forward(model, batch), batch, LossOptions())
        single = [collate(kind, [each], Padding(0, "right", 0), cpu) for each in made]
        expected = [
            model(**{name: tensor[None] for name, tensor in one.inputs.items()}, labels=one.targets).loss.item()
            for one in single
        ]
    assert (found.sum / found.weight).item() == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_all_rows_of_a_file_have_the_same_probabilities() -> None:
    """Catches a column of the predictions file for every text that is a choice of some row, and rows that lack one."""
    outputs = [torch.tensor([score]).numpy() for score in (0.0, 2.0)]
    second = torch.sigmoid(torch.tensor(2.0)).item()
    prediction = Kind(config(), ("A", "B", "C")).decode(record(["x", "y"]), [], outputs)
    assert prediction["label"] == "B"
    assert prediction["probabilities"] == pytest.approx({"A": 1 - second, "B": second, "C": 0.0})
    prediction = Kind(config(), ()).decode(record(["x", "y"]), [], outputs)
    assert prediction["label"] == "y"
    assert prediction["probabilities"] == pytest.approx([1 - second, second])


def test_choices_may_be_columns(tmp_path: Path) -> None:
    """Catches a list of columns that is refused, or read in another order, and a question that is no longer needed."""
    tree = {"kind": "multiple_choice", "train": "f", "validation": "f"}
    columns = {"choices": ["b", "a"], "question": None, "context": "text"}
    sections = {"run": {"dir": "r"}, "model": {"init_from": "m"}}
    made = build_config(FinetuneConfig, {**sections, "task": {**tree, "columns": columns}}, {})
    assert made.task.columns.names("choices") == ("b", "a")
    with pytest.raises(UserError, match="without a context there must be a question"):
        build_config(FinetuneConfig, {**sections, "task": {**tree, "columns": {"question": None}}}, {})


def test_an_architecture_without_such_a_head_is_named(encoder: Path, tmp_path: Path) -> None:
    """Catches a traceback, or a message that does not say which models would do."""
    (tmp_path / "config.json").write_text('{"model_type": "deberta", "vocab_size": 45, "pooler_hidden_size": 8}')
    with pytest.raises(UserError, match=r"no deberta model for MultipleChoice; it has one for: albert, bert, "):
        read_model_inputs(ModelSpec(tmp_path, False, Kind.auto_model, {}), load_tokenizer(encoder))


@pytest.mark.parametrize("labels", [("A", "B"), ()])
def test_equal_choices_are_no_answer(labels: tuple[str, ...]) -> None:
    """Catches a collapsed model that is right in a file whose right choices come first, and one that is not reported
    because the labels are texts, which differ; a calibration error with another accuracy; and a predicted label that
    depends on the place in a batch, or a traceback before a diverged model is reported."""
    kind = Kind(config(), labels)
    choices = [[f"x{row}", f"y{row}"] for row in range(3)]
    rows = [record(both, label=labels[0] if labels else both[0]) for both in choices]
    equal, sure = (
        [kind.decode(row, [], [np.array([first], dtype=np.float32), np.zeros(1, dtype=np.float32)]) for row in rows]
        for first in (-2e-7, 1.0)  # scores of the same tokens differ by rounding
    )
    assert (kind.scores(rows, equal)["accuracy"], kind.is_collapsed(rows, equal)) == (0.0, True)
    assert (kind.scores(rows, sure)["accuracy"], kind.is_collapsed(rows, sure)) == (1.0, False)
    other = [*rows[:2], record(choices[2], label=labels[1] if labels else choices[2][1])]
    assert [each["label"] for each in equal] == [row.values["label"] for row in rows]
    assert kind.decode(rows[0], [], [np.full(2, np.nan, dtype=np.float32)])["label"] == rows[0].values["label"]
    assert calibration_error(kind.classified(other, equal)) == pytest.approx(0.5)
    assert kind.is_collapsed(other, sure) == bool(labels)


@pytest.mark.parametrize("labels", [("A", "B", "C", "D"), ()])
def test_choices_can_be_calibrated(labels: tuple[str, ...]) -> None:
    """Catches right choices that do not fit the order of the probabilities, in rows of different length too."""
    kind = Kind(config(), labels)
    records = [
        record(label=labels[3] if labels else "word4"),
        record(["word1", "word2"], label=labels[0] if labels else "word1"),
    ]
    outputs = [np.log(np.array(row, dtype=np.float32)) for row in ([0.1, 0.2, 0.3, 0.4], [0.7, 0.3])]
    predictions = [kind.decode(one, [], [row]) for one, row in zip(records, outputs, strict=True)]
    assert np.exp(-kind.classified(records, predictions).losses) == pytest.approx([0.4, 0.7])


def test_rows_may_have_fewer_choices_than_columns(tmp_path: Path) -> None:
    """Catches an empty cell that is scored as a choice, and null that is refused."""
    columns = MultipleChoiceColumns(choices=("a", "b", "c"))
    (tmp_path / "f.csv").write_text("question,a,b,c,label\nq,x,y,,1\nq,x,y,z,2\n")
    rows = [{"question": "q", "a": "x", "b": "y", "c": each, "label": 1} for each in (None, "z")]
    (tmp_path / "f.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("f.csv", "f.jsonl"):
        found = read_table(tmp_path / name, columns).records
        assert [record.values["choices"] for record in found] == [["x", "y"], ["x", "y", "z"]]
    (tmp_path / "f.csv").write_text("question,a,b,c,label\nq,x,,z,1\n")
    with pytest.raises(UserError, match="a choice before the last one is empty"):
        read_table(tmp_path / "f.csv", columns)


def test_questions_without_a_context_are_independent() -> None:
    """Catches an interval of hundreds of questions as if they were about one text."""
    rows = [
        Record(f"f:{n}", {"context": "", "question": str(n), "choices": ["a", "b"], "label": "a"}) for n in range(40)
    ]
    found = [{"label": "ab"[number % 2], "probabilities": [0.6, 0.4]} for number in range(40)]
    alone = [replace(row, values={name: row.values[name] for name in row.values if name != "context"}) for row in rows]
    assert Kind(config(), ()).intervals(rows, found) == Kind(config(), ()).intervals(alone, found)
