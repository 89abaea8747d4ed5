import pytest

from finetune.data.records import Record
from finetune.kinds.classification import Config, Kind
from finetune.metrics.collapse import is_constant


@pytest.mark.parametrize(
    ("answers", "targets", "constant"),
    [
        (["a", "a", "a"], ["a", "b", "a"], True),
        (["a", "b", "a"], ["a", "b", "a"], False),
        (["a", "a", "a"], ["a", "a", "a"], False),
        (["a"], ["a"], False),
        ([2.501, 2.502, 2.5], [0.0, 5.0, 2.0], True),
        ([1.0, 4.0, 2.5], [0.0, 5.0, 2.0], False),
        ([[], [], []], [["x"], [], ["y"]], True),
    ],
)
def test_a_constant_answer_to_different_targets_is_a_collapse(
    answers: list[object], targets: list[object], constant: bool
) -> None:
    """Catches a collapse that is missed, above all of a regression, whose outputs are never exactly equal; and a split
    with a single label, all of it found, that counts as one."""
    assert is_constant(answers, targets) == constant


def test_a_kind_compares_answers_with_targets() -> None:
    """Catches a kind that looks at the texts or the probabilities instead."""
    kind = Kind(Config(train="f.csv", validation="f.csv"), ("a", "b"))
    records = [Record("f.csv:2", {"text": text, "label": label}) for text, label in (("x", "a"), ("y", "b"))]
    predictions = [{"label": "a", "probabilities": {"a": p, "b": 1 - p}} for p in (0.6, 0.9)]
    assert kind.is_collapsed(records, predictions)
    assert not kind.is_collapsed(records, [{"label": "a"}, {"label": "b"}])
