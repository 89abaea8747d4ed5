import tracemalloc
import warnings
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.scores.significance import (
    Difference,
    Score,
    Scores,
    accuracy_interval,
    bootstrap_scores,
    compare_scores,
    draw_records,
)

RECORDS = 400


def accuracy(right: np.ndarray) -> Score:
    """right: seeds x records."""

    def score(seed: int, rows: np.ndarray) -> float:
        return float(right[seed, rows].mean())

    return score


def draw_scores(*models: np.ndarray, resamples: int = 500) -> list[Scores]:
    units = [[number] for number in range(models[0].shape[1])]
    return [
        bootstrap_scores(accuracy(right), len(right), draw_records(units, resamples), stream)
        for stream, right in enumerate(models)
    ]


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    return compare_scores(first.mean(axis=1), second.mean(axis=1), *draw_scores(first, second))


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
    assert 0.2 < found.interval[0] < found.difference < found.interval[1] < 0.4
    assert swapped.difference == -found.difference
    assert found.p == swapped.p == pytest.approx(2 / 501)


@pytest.mark.parametrize(("opposite", "significant"), [(24, True), (25, False)])
def test_interval_and_p_agree(opposite: int, significant: bool) -> None:
    """Catches an interval without zero beside a p-value above 0.05, or with zero beside one below."""
    drawn = np.arange(1000) - opposite + 0.5
    found = compare_scores([1.0], [0.0], drawn, np.zeros(1000))
    swapped = compare_scores([0.0], [1.0], np.zeros(1000), drawn)
    assert found.p == swapped.p
    assert (found.p < 0.05) == (found.interval[0] > 0) == (swapped.interval[1] < 0) == significant


def test_related_records_are_drawn_together() -> None:
    """Catches questions on one text that count as independent ones: p would be small too often."""
    units = [[0, 3], [1], [2, 4, 5]]
    samples = list(draw_records(units, 50))
    for sample in samples:
        counts = np.bincount(sample, minlength=6)
        assert all(len({counts[number] for number in unit}) == 1 for unit in units)
        assert sum(counts[unit[0]] for unit in units) == len(units)
    assert len({tuple(sorted(sample)) for sample in samples}) > 5


@pytest.mark.parametrize("count", [3, 7, 1000, 4096])
def test_samples_are_drawn_one_by_one(count: int) -> None:
    """Catches samples that are all in memory, 8 GB for a million records, and others than those drawn at once."""
    units = [[number] for number in range(count)]
    tracemalloc.start()
    samples = draw_records(units, 200)
    assert next(samples).shape == (count,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * (count + 100) * 8  # bytes
    expected = np.random.default_rng(0).integers(0, count, size=(20, count))
    assert np.array_equal(list(draw_records([[number] for number in range(count)], 20)), expected)


def test_three_seeds_are_not_sure() -> None:
    """Catches a bootstrap alone, which calls the order of six seeds certain: by chance it is in 1 of 10 cases."""
    values = [0.800, 0.801, 0.802], [0.797, 0.798, 0.799]
    drawn = [np.random.default_rng(seed).choice(scores, (2000, 3)).mean(axis=1) for seed, scores in enumerate(values)]
    found = compare_scores(*values, *drawn)
    assert found.p == pytest.approx(0.0213, abs=1e-3)  # of Welch's test
    assert found.interval[0] < 0.001


def test_a_model_with_equal_scores_gives_no_warning() -> None:
    """Catches a warning of SciPy on the terminal, such as beside a baseline that predicts one label."""
    with warnings.catch_warnings(action="error"):
        found = compare_scores([0.6, 0.7, 0.65], [0.5, 0.5, 0.5], np.full(9, 0.65), np.full(9, 0.5))
    low, high = 0.15 - 4.3027 * 0.05 / 3**0.5, 0.15 + 4.3027 * 0.05 / 3**0.5  # Student's t with 2 degrees of freedom
    assert found.interval == pytest.approx((low, high), abs=1e-4)


def test_one_seed_gives_the_paired_bootstrap() -> None:
    """Catches an unpaired test, which finds little in models that are right on almost the same records.

    The exact sign test of McNemar says how likely such a difference is.
    """
    from scipy.stats import binomtest

    first = answers(0.7, 1, 0)
    second = first.copy()
    gained, lost = np.flatnonzero(~first[0])[:14], np.flatnonzero(first[0])[:4]
    second[0, gained], second[0, lost] = True, False
    found = compare(second, first)
    assert found.difference == pytest.approx(10 / RECORDS)
    assert found.p == pytest.approx(binomtest(14, 18).pvalue, abs=0.02)


def test_the_seeds_count_too() -> None:
    """Catches an interval for these seeds alone: with others the order might be the other way round."""
    spread = np.stack([answers(share, 1, seed)[0] for seed, share in enumerate((0.5, 0.7, 0.9))])
    steady = answers(0.68, 3, 9)
    low, high = compare(spread, steady).interval
    low_steady, high_steady = compare(answers(0.7, 3, 5), steady).interval
    assert low < 0 < high
    assert high - low > 2 * (high_steady - low_steady)


def test_seeds_of_two_models_are_not_drawn_in_pairs() -> None:
    """Catches an interval without the spread of the seeds where two models have the same one."""
    first, second = draw_scores(*[np.repeat([[0.5], [0.7], [0.9]], RECORDS, axis=1)] * 2)
    assert np.std(first - second) == pytest.approx(np.sqrt(2) * np.std(first), rel=0.1)


def test_independent_questions_have_wilsons_interval() -> None:
    """Catches another interval than method 3 of Newcombe (1998), whose example is 81 of 263."""
    right = [True] * 81 + [False] * (263 - 81)
    assert accuracy_interval(right, range(263)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_questions_on_one_text_widen_the_interval() -> None:
    """Catches an interval of single questions: 50 texts of 20 questions, all right or all wrong, are 50 draws."""
    right = np.repeat(np.arange(50) % 2 == 0, 20).tolist()
    groups = np.repeat(np.arange(50), 20).tolist()
    low, high = accuracy_interval(right, [f"text {group}" for group in groups])
    spread = 2.0096 * np.sqrt(0.25 / 49)
    assert (low, high) == pytest.approx((0.5 - spread, 0.5 + spread), abs=1e-4)


@pytest.mark.parametrize("texts", [2, 3, 5, 10, 30])
def test_intervals_of_few_texts_hold(texts: int) -> None:
    """Catches an interval that is certain of an article, or too narrow for few."""
    draw = np.random.default_rng(texts)
    groups, held = np.repeat(np.arange(texts), 20), 0
    for _ in range(300):
        low, high = accuracy_interval((draw.random((texts, 20)) < draw.beta(7, 3, (texts, 1))).flatten(), groups)
        held += low <= 0.7 <= high
    assert held > 0.9 * 300
    assert accuracy_interval([True] * 35 + [False] * 15, [0] * 50)[0] < 0.2  # one text says little


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("groups", [range(10), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_a_perfect_score_has_an_interval(right: bool, groups: Sequence[int]) -> None:
    """Catches a division by zero, bounds outside of 0 to 1, and a bootstrap that knows no other result."""
    low, high = accuracy_interval([right] * 10, groups)
    assert 0 <= low < high <= 1
