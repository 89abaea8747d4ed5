from collections.abc import Sequence

import numpy as np
import pytest

from finetune.metrics.intervals import accuracy_interval


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
