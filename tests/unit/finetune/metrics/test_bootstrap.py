"""Whether a difference of two rows is more than chance."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from finetune.metrics.bootstrap import (
    Difference,
    Score,
    accuracy_interval,
    bootstrap_scores,
    compare_scores,
    draw_records,
)

RECORDS = 400


def accuracy(right: np.ndarray) -> Score:
    """right: seeds x records."""

    def score(seed: int, rows: Sequence[int]) -> float:
        return float(right[seed, rows].mean())

    return score


def compare(first: np.ndarray, second: np.ndarray, resamples: int = 2000) -> Difference:
    records = draw_records(first.shape[1], resamples)
    scores = [
        bootstrap_scores(accuracy(right), len(right), records, stream) for stream, right in enumerate((first, second))
    ]
    return compare_scores(float(first.mean() - second.mean()), *scores)


def answers(share: float, seeds: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, RECORDS)) < share


def test_a_model_is_not_better_than_itself() -> None:
    """Catches a test that finds differences where there are none, and records drawn separately for each model."""
    right = answers(0.7, 1, 0)
    found = compare(right, right)
    assert found.p == 1.0
    assert found.interval == (0.0, 0.0)


def test_a_large_difference_is_found_and_has_a_sign() -> None:
    """Catches models that are swapped, and a p-value below what the number of resamples allows."""
    better, worse = answers(0.9, 3, 0), answers(0.6, 3, 1)
    found, swapped = compare(better, worse), compare(worse, better)
    assert 0.2 < found.interval[0] < found.mean < found.interval[1] < 0.4
    assert swapped.mean == -found.mean
    assert found.p == swapped.p == pytest.approx(2 / 2001)


def test_one_seed_gives_the_paired_bootstrap() -> None:
    """Catches an unpaired test, which finds little in models that are right on almost the same records.

    The exact sign test of McNemar says how likely such a difference is.
    """
    first = answers(0.7, 1, 0)
    second = first.copy()
    gained, lost = np.flatnonzero(~first[0])[:14], np.flatnonzero(first[0])[:4]
    second[0, gained], second[0, lost] = True, False
    found = compare(second, first)
    assert found.mean == pytest.approx(10 / RECORDS)
    assert found.p == pytest.approx(binomtest(14, 18).pvalue, abs=0.02)


def test_the_seeds_count_too() -> None:
    """Catches an interval for these seeds alone: with others the order might be the other way round."""
    spread = np.stack([answers(share, 1, seed)[0] for seed, share in enumerate((0.5, 0.7, 0.9))])
    steady = answers(0.68, 3, 9)
    low, high = compare(spread, steady).interval
    low_steady, high_steady = compare(answers(0.7, 3, 5), steady).interval
    assert low < 0 < high
    assert high - low > 2 * (high_steady - low_steady)


def test_independent_questions_have_wilsons_interval() -> None:
    """Catches another interval than method 3 of Newcombe (1998), whose example is 81 of 263."""
    right = [True] * 81 + [False] * (263 - 81)
    assert accuracy_interval(right, range(263)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_questions_on_one_text_widen_the_interval() -> None:
    """Catches a bootstrap over questions: 50 texts of 20 questions, all right or all wrong, are 50 draws."""
    right = np.repeat(np.arange(50) % 2 == 0, 20).tolist()
    groups = np.repeat(np.arange(50), 20).tolist()
    low, high = accuracy_interval(right, [f"text {group}" for group in groups])
    spread = 1.96 * np.sqrt(0.25 / 50)
    assert (low, high) == pytest.approx((0.5 - spread, 0.5 + spread), abs=0.015)
    assert accuracy_interval(right, [f"text {group}" for group in groups]) == (low, high)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("groups", [range(10), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_a_perfect_score_has_an_interval(right: bool, groups: Sequence[int]) -> None:
    """Catches a division by zero, bounds outside of 0 to 1, and a bootstrap that knows no other result."""
    low, high = accuracy_interval([right] * 10, groups)
    assert 0 <= low < high <= 1
