import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.data.records import Record, Table, read_table
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import Batch, Example
from finetune.kinds.multi_label import Config, Kind, MultiLabelColumns
from finetune.prediction.saved_task import SavedTask, override_task
from finetune.scores.calibration import calibration_error
from finetune.task_kind import LossOptions

CONFIG = Config(train="f", validation="f", label_separator="|")
KIND = Kind(CONFIG, ("a", "b", "c"))
TOKENS = (Tokens(torch.tensor([1]), None),)


def read(path: Path, content: str) -> Table:
    path.write_text(content)
    return read_table(path, CONFIG.columns)


def test_labels_are_lists_or_text(tmp_path: Path, encoder: Path) -> None:
    """Catches a separator that is ignored, and rows without labels that are rejected or lost."""
    csv = read(tmp_path / "f.csv", 'labels,text\na | b,x\n,x\n"[""c"", 1]",x\n')
    jsonl = read(tmp_path / "f.jsonl", '{"labels": ["b", "a"], "text": "x"}\n{"labels": [], "text": "x"}\n')
    kind = Kind(CONFIG, Kind.find_labels(CONFIG, csv))
    assert kind.labels == ("1", "a", "b", "c")
    encode = Encoder(load_tokenizer(encoder), 8, token_types=True)
    targets = [kind.expand(record, encode, True)[0].target for record in (*csv.records, *jsonl.records)]
    assert targets == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_another_separator_is_remarked_upon(tmp_path: Path) -> None:
    """Catches a model of hundreds of labels because some rows have another separator, such as a Chinese comma."""

    def remarks(*labels: str) -> list[str]:
        table = read(tmp_path / "f.csv", "labels,text\n" + "".join(f"{label},x\n" for label in labels))
        return Kind(CONFIG, Kind.find_labels(CONFIG, table)).describe(table)[1:]

    assert remarks("快|贵", "快，慢", "好/坏") == []
    assert remarks("very positive", "positive", "negative") == []
    assert remarks("0", "0 27", "27")[0].startswith("the label '0 27' is other labels with ' ' between them: set")
    assert remarks("快|贵", "快， 贵", "贵") == [
        "the label '快， 贵' is other labels with '，' between them: set task.label_separator, or use one "
        "separator in all rows"
    ]


@pytest.mark.parametrize("cell", ["[ 2 27]", "[0. 1. 0.]", "[joy, anger]", "['joy']"])
def test_brackets_without_json_are_rejected(tmp_path: Path, cell: str) -> None:
    """Catches a class for each combination of labels, because pandas wrote arrays or Python lists to a CSV file."""
    with pytest.raises(
        UserError, match=r"f\.csv:2: expected a list of labels, or text in 'labels', found .*; not JSON"
    ):
        read(tmp_path / "f.csv", f'labels,text\n"{cell}",x\n')


def test_labels_may_be_in_brackets(tmp_path: Path) -> None:
    """Catches labels in brackets that are taken for a list."""
    table = read(tmp_path / "f.csv", 'labels,text\n"[joy] | [anger]",x\n[other],x\n')
    assert Kind.find_labels(CONFIG, table) == ("[anger]", "[joy]", "[other]")


def test_an_empty_label_is_none(tmp_path: Path) -> None:
    """Catches a class without a name for rows that have no label, as `"".split()` and some exports write them."""
    table = read(tmp_path / "f.jsonl", '{"labels": [""], "text": "x"}\n{"labels": ["b", " ", "a"], "text": "x"}\n')
    assert [record.values["labels"] for record in table.records] == [[], ["b", "a"]]
    assert Kind.find_labels(CONFIG, table) == ("a", "b")


def test_a_number_and_its_text_with_a_point_are_not_two_labels(tmp_path: Path) -> None:
    """Catches one label that becomes two, because it is 1.0 in a part of the lists and "1.0" in others."""
    table = read(tmp_path / "f.jsonl", '{"labels": ["a", 1.0], "text": "x"}\n{"labels": ["1.0"], "text": "x"}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:2: the label '1\.0' is the number of another label, '1' \("):
        Kind.find_labels(CONFIG, table)


@pytest.mark.parametrize("labels", [("joy", "fear", "love"), ("0", "1", "2")])
def test_multi_hot_vectors_are_read_with_the_labels_of_the_task(
    tmp_path: Path, encoder: Path, labels: tuple[str, ...]
) -> None:
    """Catches vectors of floats, as transformers' own models train on, that become the labels 0 and 1."""
    config = CONFIG.model_copy(update={"labels": labels})
    rows = (
        "[1.0, 0.0, 1.0]",
        "[0, 0, 0]",
        "[false, true, false]",
        f'["{labels[2]}"]',
        f'["{labels[0]}", "{labels[2]}"]',
    )
    table = read(tmp_path / "f.jsonl", "".join(f'{{"labels": {row}, "text": "x"}}\n' for row in rows))
    kind, encode = Kind(config, labels), Encoder(load_tokenizer(encoder), 8, token_types=True)
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]
    for record, target in zip(table.records, expected, strict=True):
        kind.check_target(record)
        assert kind.expand(record, encode, True)[0].target == target
    predictions = [{"labels": [label for label, is_in in zip(labels, row, strict=True) if is_in]} for row in expected]
    assert kind.scores(table.records, predictions)["accuracy"] == 1.0
    assert f"{labels[0]} 40.0%, {labels[1]} 20.0%" in kind.describe(table)[0]


@pytest.mark.parametrize("labels", [None, ("ä", "ö")])
def test_a_column_for_each_label(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    """Catches data sets such as Jigsaw's being rejected, columns in the order of the file, and names that are lost."""
    config = Config(columns=MultiLabelColumns(labels=("b", "a")), labels=labels)
    (tmp_path / "f.csv").write_text("text,a,b\nx,1,0\nx,0.0,1.0\nx,0,0\nx,True,1\n")
    (tmp_path / "f.jsonl").write_text('{"text": "x", "a": true, "b": 0}\n{"text": "x", "a": 0, "b": 1.0}\n')
    table = read_table(tmp_path / "f.csv", config.columns)
    kind = Kind(config, Kind.find_labels(config, table))
    assert kind.labels == (labels or ("b", "a"))
    records = (*table.records, *read_table(tmp_path / "f.jsonl", config.columns).records)
    first, second = kind.labels
    assert [kind.target(record, ["labels"]) for record in records] == [
        {second},
        {first},
        set(),
        {first, second},
        {second},
        {first},
    ]
    for hidden in ("-1,-1.0", ","):
        (tmp_path / "f.csv").write_text(f"text,a,b\nx,{hidden}\n")
        assert not read_table(tmp_path / "f.csv", config.columns, targets_required=False).labelled
    (tmp_path / "f.csv").write_text("text,a,b\nx,1,2\n")
    with pytest.raises(UserError, match=r"f\.csv:2: expected .* in 'b, a', found \[\"2\", \"1\"\]; .* have 1 or 0"):
        read_table(tmp_path / "f.csv", config.columns)


@pytest.mark.parametrize(
    ("labels", "columns", "found"),
    [
        (None, "[x, y, z]", {"b"}),
        (None, "[b, x, y]", {"b"}),
        (None, "[c, a, b]", {"c"}),
        (("ä", "ö", "ü"), "[x, y, z]", {"ä"}),
        (("c", "b", "a"), "[x, y, z]", {"b"}),
        (("c", "b", "a"), "[b, a, c]", {"b"}),
    ],
)
def test_columns_of_another_file_have_the_order_or_the_names_of_the_labels(
    labels: tuple[str, ...] | None, columns: str, found: set[str]
) -> None:
    """Catches a file that cannot be scored because its columns are called otherwise, and columns with the names of the
    labels that are taken for others. The first column of the file has the 1."""
    config = Config(columns=MultiLabelColumns(labels=("b", "a", "c")), labels=labels)
    saved = SavedTask(Kind(config, labels or ("b", "a", "c")), max_seq_length=8)
    kind = override_task(saved, {"columns.labels": columns}).kind
    record = Record("f.csv:2", {"text": "x", "labels": ["1", "0", "0"]})
    kind.check_target(record)
    assert kind.target(record, ["labels"]) == found
    with pytest.raises(UserError, match=r"two or more different columns, as many as in `labels`"):
        override_task(saved, {"columns.labels": "[b, a]"})


def test_a_column_with_the_name_of_another_label_is_rejected() -> None:
    """Catches scores of two labels that have changed places."""
    with pytest.raises(ValueError, match=r"columns\.labels: a has the name of a label, but not its place"):
        Config(columns=MultiLabelColumns(labels=("a", "x", "y")), labels=("b", "a", "c"))


@pytest.mark.parametrize(("columns", "labels"), [(("a",), None), (("a", "a"), None), (("a", "b"), ("a", "b", "c"))])
def test_columns_and_labels_are_as_many(columns: tuple[str, ...], labels: tuple[str, ...] | None) -> None:
    """Catches a traceback of rows that do not fit the labels."""
    with pytest.raises(ValueError, match="two or more different columns, as many as in `labels`"):
        Config(columns=MultiLabelColumns(labels=columns), labels=labels)


def test_two_labels_called_0_and_1_are_no_vector(tmp_path: Path) -> None:
    """Catches lists of labels that are taken for vectors."""
    table = read(tmp_path / "f.jsonl", '{"labels": [0, 1], "text": "x"}\n{"labels": [1], "text": "x"}\n')
    assert Kind.find_labels(CONFIG, table) == ("0", "1")
    config = CONFIG.model_copy(update={"labels": ("0", "1")})
    assert Kind(config, ("0", "1")).describe(table)[0].endswith("0 50.0%, 1 100.0%; none 0.0%")


@pytest.mark.parametrize("rows", [("[1.0, 0.0, 0.0]", "[0.0, 0.0, 1.0]"), ("[1, 0]", "[0, 1]"), ('"1|0"', '"0|0"')])
def test_multi_hot_vectors_need_names(tmp_path: Path, rows: tuple[str, str]) -> None:
    """Catches a model that has learned that every row has the labels 0 and 1, with an F1 of 1."""
    table = read(tmp_path / "f.jsonl", "".join(f'{{"labels": {row}, "text": "x"}}\n' for row in rows))
    message = r"f\.jsonl: the labels of each row are \d zeros and ones, .* names of the \d labels, .* in task\.labels"
    with pytest.raises(UserError, match=message):
        Kind.find_labels(CONFIG, table)


def test_an_unknown_label_is_named(encoder: Path) -> None:
    """Catches a label of validation that train lacks, dropped silently."""
    record = Record("f.csv:3", {"labels": ["a", "bb"], "text": "x"})
    with pytest.raises(UserError, match=r"f\.csv:3: unknown label 'bb' .*; did you mean 'b'\?"):
        KIND.expand(record, Encoder(load_tokenizer(encoder), 8, token_types=True), training=False)


def test_one_label_is_no_task(tmp_path: Path) -> None:
    """Catches a wrong column or separator."""
    with pytest.raises(UserError, match=r"only the label 'a, b'; expected two or more"):
        Kind.find_labels(CONFIG, read(tmp_path / "f.csv", 'labels,text\n"a, b",x\n'))


def test_scores() -> None:
    """Catches swapped averages, a division by zero without labels, and rows drawn by a bootstrap that are worse for the
    labels that they lack: the values are computed by hand. a: 1 of 2 found; b: found; c: one too many."""
    records = [Record("f", {"labels": labels}) for labels in (["a", "b"], ["a"], [])]
    predictions = [{"labels": labels} for labels in (["a", "b"], [], ["c"])]
    found = KIND.scores(records, predictions)
    a, b, c = 2 / 3, 1.0, 0.0
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((a + b + c) / 3)
    assert found["weighted_f1"] == pytest.approx((2 * a + b) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    nothing = KIND.scores(records[2:], [{"labels": []}])
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "weighted_f1": 0.0, "accuracy": 1.0}
    perfect = KIND.scorer(records, [{"labels": labels} for labels in (["a", "b"], ["a"], [])])
    assert [perfect(np.array(rows))["macro_f1"] for rows in ([0, 1, 2], [1, 1, 2])] == [2 / 3] * 2, "c is unknown"
    assert perfect(np.array([2]))["macro_f1"] == 0.0


def test_scores_of_each_label() -> None:
    """Catches precision and recall mixed up. a: 1 of 2 found; b: found; c: one too many."""
    records = [Record("f", {"labels": labels}) for labels in (["a", "b"], ["a"], [])]
    predictions = [{"labels": labels} for labels in (["a", "b"], [], ["c"])]
    found = KIND.label_scores(records, predictions)
    assert found["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert found["b"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert found["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_calibration_of_each_label() -> None:
    """Catches probabilities of labels that are scaled to a sum of 1, or predictions that change."""
    prediction = {"labels": ["a", "c"], "probabilities": {"a": 0.9, "b": 0.1, "c": 0.5}}
    scaled = KIND.calibrate(prediction, 2.0)
    assert scaled["labels"] == ["a", "c"]
    assert scaled["probabilities"] == {"a": pytest.approx(0.75), "b": pytest.approx(0.25), "c": pytest.approx(0.5)}
    records = [Record("f", {"labels": labels}) for labels in (["a"], ["b"])]
    found = KIND.classified(records, [prediction] * 2)
    assert np.exp(-found.losses) == pytest.approx([0.9, 0.9, 0.5, 0.1, 0.1, 0.5])
    errors = 4 * 0.9 - 2, 2 * 0.5  # two of four are right at 0.9, and none at 0.5, which is predicted
    assert calibration_error(found) == pytest.approx(sum(map(abs, errors)) / 6)


def test_high_logits_are_calibrated() -> None:
    """Catches probabilities of exactly 1, which is what fp32 has above a logit of 17: no temperature lowers them, and
    the loss of a wrong one is that of a much higher logit."""
    prediction = KIND.decode(Record("f", {}), [], [np.array([18.0, -18.0, 0.0], dtype=np.float32)])
    scaled = KIND.calibrate(prediction, 4.0)["probabilities"]
    assert list(scaled.values()) == pytest.approx([1 / (1 + np.exp(-4.5)), 1 / (1 + np.exp(4.5)), 0.5])
    assert KIND.losses([Record("f", {"labels": []})], [prediction]) == pytest.approx([(18 + np.log(2)) / 3])


def test_balanced_weights_reach_the_loss() -> None:
    """Catches weights of the wrong side, and labels that do not have the same share of the loss."""
    examples = [Example(TOKENS, target) for target in ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0])]
    weights = KIND.label_weights(examples)
    assert weights == pytest.approx([1.0, 1.5, 1.0, 1.0, 0.75, 1.0])
    targets = torch.tensor([example.target for example in examples])
    loss = KIND.loss(torch.zeros(3, 3), Batch(tuple(examples), {}, targets), LossOptions(torch.tensor(weights)))
    assert loss.sum.item() == pytest.approx(torch.log(torch.tensor(2.0)).item() * 3)
    assert loss.weight.item() == 3


def test_a_prediction_is_json() -> None:
    """Catches numpy or torch numbers in a prediction."""
    prediction = KIND.decode(Record("f", {}), [], [torch.tensor([3.0, -3.0, 0.0]).numpy()])
    assert json.loads(json.dumps(prediction)) == prediction
    assert prediction["labels"] == ["a", "c"]


def test_the_worst_rows_miss_labels_or_invent_them() -> None:
    """Catches losses that only look at the labels a row has."""
    records = [Record("f.csv:2", {"labels": labels}) for labels in ([], ["a"], ["a", "b"])]
    sure = {"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.1, "c": 0.5}}
    losses = KIND.losses(records, [sure] * 3)
    shares = [(0.1, 0.9, 0.5), (0.9, 0.9, 0.5), (0.9, 0.1, 0.5)]  # of what is right, by label
    assert losses == pytest.approx([-np.log(share).mean() for share in shares])
