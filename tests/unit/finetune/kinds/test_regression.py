import json
import math
from pathlib import Path

import pytest

from experiment.errors import UserError
from finetune.data.records import Record, read_table
from finetune.kinds.regression import Config, Kind

CONFIG = Config(train="f", validation="f")
KIND = Kind(CONFIG, ())


def scores(targets: list[float], predicted: list[float]) -> dict[str, float]:
    records = [Record("f", {"label": value}) for value in targets]
    return KIND.scores(records, [{"value": value} for value in predicted])


def test_correlations() -> None:
    """Catches swapped coefficients: of ranks 1 2 3 4 and values 1 2 3 100, only Spearman's is 1."""
    found = scores([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 100.0])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(149 / math.sqrt(5 * 7205))


@pytest.mark.parametrize(("targets", "predicted"), [([1.0, 2.0], [3.0, 3.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_a_constant_side_scores_zero(targets: list[float], predicted: list[float]) -> None:
    """Catches NaN, which makes an epoch neither better nor worse than another."""
    found = scores(targets, predicted)
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def test_errors_are_in_the_units_of_the_targets() -> None:
    """Catches errors whose sign counts, a mean squared error in place of its root, and an epoch that is best because
    its errors are largest."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    targets, predicted = [1.0, 2.0, 3.0, 4.0], [2.0, 0.0, 3.0, 7.0]
    found = scores(targets, predicted)
    assert found["rmse"] == pytest.approx(mean_squared_error(targets, predicted) ** 0.5)
    assert found["mae"] == pytest.approx(mean_absolute_error(targets, predicted))
    assert Kind.lower_is_better == ("rmse", "mae")
    assert Kind.metrics() == ("pearson", "spearman", "rmse", "mae")


@pytest.mark.parametrize("cell", ["high", "nan", "inf", True, [1]])
def test_what_is_no_number_is_rejected(tmp_path: Path, cell: object) -> None:
    """Catches a NaN that makes the whole training diverge, and `true` taken for 1."""
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"label": 1.5, "sentence1": "a"}) + "\n" + json.dumps({"label": cell, "sentence1": "b"}))
    with pytest.raises(UserError, match=r"f\.jsonl:2: expected a number in 'label', found"):
        read_table(path, CONFIG.columns)


def test_numbers_are_read_from_csv(tmp_path: Path) -> None:
    """Catches numbers left as text."""
    path = tmp_path / "f.csv"
    path.write_text("label,sentence1\n 3.8 ,a\n5,b\n")
    assert [record.values["label"] for record in read_table(path, CONFIG.columns).records] == [3.8, 5.0]


def test_the_worst_rows_are_the_farthest() -> None:
    """Catches a difference whose sign counts: numbers that are too high must not come last."""
    records = [Record("f.csv:2", {"label": label}) for label in (1.0, 2.0, 3.0)]
    losses = KIND.losses(records, [{"value": value} for value in (1.5, 0.0, 5.5)])
    assert losses.tolist() == [0.25, 4.0, 6.25]
