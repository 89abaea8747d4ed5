import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.data.records import Record, Table, read_table
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import Batch, Example
from finetune.kinds.classification import Config, Kind
from finetune.prepared_task import make_kind
from finetune.task_kind import LossOptions

CONFIG = Config(train="f.csv", validation="f.csv")
KIND = Kind(CONFIG, ("a", "b"))


def table(*labels: str) -> Table:
    records = (Record(f"f.csv:{line}", {"label": label, "text": ""}) for line, label in enumerate(labels, 2))
    return Table(Path("f.csv"), tuple(records), labelled=True)


def example(target: int) -> Example:
    return Example((Tokens(torch.tensor([1]), None),), target)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["joy", "anger", "joy"], ("anger", "joy")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["1", "01", "2"], ("01", "1", "2")),
    ],
)
def test_labels_are_found_in_one_order(labels: list[str], expected: tuple[str, ...]) -> None:
    """Catches label ids that depend on the order of the rows, or put class 10 before class 2."""
    assert Kind.find_labels(CONFIG, table(*labels)) == expected
    assert Kind.find_labels(CONFIG, table(*reversed(labels))) == expected


def test_one_label_is_no_task() -> None:
    """Catches training on a wrong column that has a single value."""
    with pytest.raises(UserError, match="every row has the label 'x'"):
        Kind.find_labels(CONFIG, table("x", "x"))


def test_an_unknown_label_is_named_with_its_line(encoder: Path) -> None:
    """Catches validation labels that do not occur in train mapped to some id."""
    encode = Encoder(load_tokenizer(encoder), 8, token_types=False)
    with pytest.raises(UserError, match=r"f\.csv:3: unknown label 'c' \(.* of task\.labels\); known: a, b"):
        [KIND.expand(record, encode, training=True) for record in table("a", "c").records]


def test_a_label_like_a_known_one_is_suggested(encoder: Path) -> None:
    """Catches a typing error in one of thousands of labels that the user has to find alone."""
    kind = Kind(CONFIG, ("negative", "positive"))
    encode = Encoder(load_tokenizer(encoder), 8, token_types=False)
    with pytest.raises(UserError, match=r"f\.csv:2: unknown label 'negtive' .*; did you mean 'negative'\?"):
        kind.expand(table("negtive").records[0], encode, training=True)


def test_a_label_that_train_lacks_is_to_be_listed(encoder: Path) -> None:
    """Catches a rare label of validation that ends the run with a list of thousands of others, and no advice."""
    labels, encode = tuple(map(str, range(10**4, 2 * 10**4))), Encoder(load_tokenizer(encoder), 8, token_types=False)
    with pytest.raises(UserError, match=r"or of task\.labels\); known: 10000, ") as error:
        Kind(CONFIG, labels).expand(table("rare").records[0], encode, training=False)
    assert len(str(error.value)) < 500
    with pytest.raises(UserError, match=r"f\.csv:2: unknown label 'rare'; known: a, b$"):
        Kind(CONFIG.model_copy(update={"labels": ("a", "b")}), ("a", "b")).check_target(table("rare").records[0])


@pytest.mark.parametrize("label", ["nan", "inf"])
def test_a_missing_value_is_no_fraction(label: str) -> None:
    """Catches `nan`, as pandas writes missing labels, that is said to need a regression."""
    message = rf"f\.csv:3: the label {label} among numbers looks like a missing value; remove such rows, or"
    with pytest.raises(UserError, match=message):
        Kind.find_labels(CONFIG, table("0", label, "1"))


def test_fractions_are_no_labels() -> None:
    """Catches a regression task trained as hundreds of classes; "1.0" and a list of labels are meant as classes."""
    with pytest.raises(UserError, match=r"f\.csv:3: the label 0\.5 is a fraction; for regression set task\.kind: reg"):
        Kind.find_labels(CONFIG, table("1", "0.5", "2.25"))
    assert Kind.find_labels(CONFIG, table("1.0", "0.0")) == ("0.0", "1.0")
    assert Kind.find_labels(CONFIG, table("1.5", "other")) == ("1.5", "other")
    listed = CONFIG.model_copy(update={"labels": ("0.5", "1.0")})
    assert make_kind(listed, {"train": table("0.5", "1.0")}).labels == ("0.5", "1.0")


def test_fractions_in_json_are_like_fractions_in_csv(tmp_path: Path) -> None:
    """Catches listed labels that only CSV files may have."""
    (tmp_path / "f.jsonl").write_text('{"sentence1": "a", "label": 0.5}\n{"sentence1": "b", "label": 1.0}\n')
    found = read_table(tmp_path / "f.jsonl", CONFIG.columns)
    assert [record.values["label"] for record in found.records] == ["0.5", "1"]
    with pytest.raises(UserError, match=r"f\.jsonl:1: the label 0\.5 is a fraction; for regression"):
        Kind.find_labels(CONFIG, found)
    (tmp_path / "f.jsonl").write_text('{"sentence1": "a", "label": "joy"}\n{"sentence1": "b", "label": NaN}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:2: expected a label in 'label', found NaN"):
        read_table(tmp_path / "f.jsonl", CONFIG.columns)


@pytest.mark.parametrize("other", ["joy", "2"])
def test_a_number_and_its_text_with_a_point_are_not_two_labels(tmp_path: Path, other: str) -> None:
    """Catches one class that becomes two, because its label is 1.0 in a part of the rows and "1.0" in others; versions
    and numbers of sections are classes."""
    rows = [{"label": label, "sentence1": "x"} for label in (other, "1.0", 1.0, "1.0")]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = read_table(tmp_path / "f.jsonl", CONFIG.columns)
    message = (
        r"f\.jsonl:2: the label '1\.0' is the number of another label, '1' \(.*f\.jsonl:3\); write both the same way"
    )
    with pytest.raises(UserError, match=message):
        Kind.find_labels(CONFIG, train)
    listed = CONFIG.model_copy(update={"labels": ("1", "1.0", other)})
    assert make_kind(listed, {"train": train}).labels == listed.labels
    for labels in (["-1.00", "0", "1"], ["v1", "v1.0"], ["1", "1.0.0", "1.1"], ["01", "1"]):
        assert set(Kind.find_labels(CONFIG, table(*labels, "x"))) == {*labels, "x"}


def test_balanced_weights_give_each_label_the_same_share() -> None:
    """Catches weights by frequency instead of against it, and a division by zero for a label without examples."""
    weights = Kind(CONFIG, ("a", "b", "c")).label_weights([example(target) for target in (0, 0, 0, 1)])
    assert weights == pytest.approx([4 / 6, 4 / 2, 0.0])
    assert 3 * weights[0] == pytest.approx(1 * weights[1])


def test_loss_weighs_labels() -> None:
    """Catches class weights that never reach the loss, and a loss that is divided by those of its own batch: a batch
    without rare labels would then count as much as one with them."""
    logits = torch.zeros(2, 2)
    logits[0, 0] = 2.0
    per_example = -torch.log_softmax(logits, dim=-1)[torch.arange(2), torch.tensor([0, 1])]
    batch = Batch((example(0), example(1)), {}, torch.tensor([0, 1]))
    loss = KIND.loss(logits, batch, LossOptions(torch.tensor([1.0, 3.0])))
    assert loss.sum.item() == pytest.approx((per_example[0] + 3 * per_example[1]).item())
    assert loss.weight == 2


def test_any_number_of_labels_is_scored() -> None:
    """Catches counts of each pair of labels, 80 GB for 100,000 labels."""
    kind = Kind(CONFIG, tuple(map(str, range(1000))))
    records = [Record("f", {"label": label}) for label in ("7", "7", "999")]
    tracemalloc.start()
    found = kind.label_scores(records, [{"label": label} for label in ("7", "8", "999")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 1000  # bytes
    assert found["7"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert found["0"]["support"] == 0


def test_many_labels_are_described_on_one_line() -> None:
    """Catches a line with thousands of labels, or with the first ones by name."""
    labels = tuple(f"{number:04}" for number in range(2000))
    (line,) = Kind(CONFIG, labels).describe(table("1234", "1234", *labels))
    assert line.startswith("2,000 labels, in train: 1234 0.1%, 0000 0.0%, 0001 0.0%")
    assert line.endswith(", …")
    assert line.count("%") == 30
    assert KIND.describe(table("a", "b", "a", "a")) == ["2 labels, in train: a 75.0%, b 25.0%"]
