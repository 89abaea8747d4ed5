from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from finetune.tasks.kinds import KINDS, balanced_weights
from finetune.tasks.rows import Row, TaskTable

KIND = KINDS["classification"]


def table(*labels: str) -> TaskTable:
    return TaskTable(
        Path("f.csv"), tuple(Row(n, {"label": label, "text": ""}) for n, label in enumerate(labels, 2)), True
    )


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
    assert KIND.find_labels(table(*labels)) == expected
    assert KIND.find_labels(table(*reversed(labels))) == expected


def test_one_label_is_no_task() -> None:
    """Catches training on a wrong column that has a single value."""
    with pytest.raises(UserError, match="every row has the label 'x'"):
        KIND.find_labels(table("x", "x"))


def test_an_unknown_label_is_named_with_its_line() -> None:
    """Catches validation labels that do not occur in train mapped to some id."""
    rows = table("a", "c")
    with pytest.raises(UserError, match=r"f\.csv:3: unknown label 'c'; known: a, b"):
        [KIND.target(rows, row, ("a", "b")) for row in rows.rows]


def test_balanced_weights_give_each_label_the_same_share() -> None:
    """Catches weights by frequency instead of against it, and a division by zero for a label without examples."""
    weights = balanced_weights([0, 0, 0, 1], 3)
    assert weights == pytest.approx([4 / 6, 4 / 2, 0.0])
    assert 3 * weights[0] == pytest.approx(1 * weights[1])


def test_loss_weighs_labels() -> None:
    """Catches class weights that never reach the loss: the weighted mean is computed by hand here."""
    logits = torch.zeros(2, 2)
    logits[0, 0] = 2.0
    per_example = -torch.log_softmax(logits, dim=-1)[torch.arange(2), torch.tensor([0, 1])]
    weighted = KIND.loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx(((per_example[0] + 3 * per_example[1]) / 4).item())
