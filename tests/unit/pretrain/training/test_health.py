import math

import pytest

from pretrain.training.health import (
    HEALTH_LIMITS,
    NORM_WINDOW,
    Fault,
    append_norm,
    count_consecutive,
    diagnose,
    norm_limit,
)


def test_a_spike_is_far_above_the_median_once_there_is_one() -> None:
    """Catches spikes seen in the first wild steps of a run, and a limit that is a mean, which one large norm moves."""
    assert norm_limit([1.0] * (HEALTH_LIMITS.min_norms - 1), 10.0, HEALTH_LIMITS) == math.inf
    assert norm_limit([1.0] * HEALTH_LIMITS.min_norms, 10.0, HEALTH_LIMITS) == 10.0
    assert (
        norm_limit([1.0] * HEALTH_LIMITS.min_norms + [9.0] * (HEALTH_LIMITS.min_norms - 1), 10.0, HEALTH_LIMITS) == 10.0
    )
    assert norm_limit([0.0] * HEALTH_LIMITS.min_norms, 10.0, HEALTH_LIMITS) == math.inf, (
        "every gradient is above nothing"
    )


def test_the_window_forgets() -> None:
    """Catches a median over the whole run, beside which the small gradients of its end never stand out."""
    norms: tuple[float, ...] = ()
    for norm in [100.0] * NORM_WINDOW + [1.0] * NORM_WINDOW:
        norms = append_norm(norms, norm)
    assert norms == (1.0,) * NORM_WINDOW


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "said"),
    [
        (math.nan, math.nan, False, "the loss is nan"),
        (math.inf, math.nan, True, "the loss is inf"),
        (2.5, math.inf, False, "the gradient norm is inf, the loss 2.5"),
        (2.5, math.nan, False, "the gradient norm is nan"),
        (2.5, 42.0, False, "42, 21 times the median of the recent steps (2)"),
        (2.5, 42.0, True, "21 times"),
    ],
)
def test_what_is_wrong_is_said(loss: float, norm: float, scaled: bool, said: str) -> None:
    """Catches a message that names the consequence (NaN gradients) in the place of the cause."""
    fault = diagnose(7, loss, norm, [1.0, 2.0, 3.0], scaled)
    assert isinstance(fault, Fault)
    assert str(fault).startswith("step 7: ")
    assert said in str(fault)


def test_an_overflow_of_fp16_is_no_fault() -> None:
    """Catches a run in fp16 that is stopped by its own loss scaler at work."""
    assert diagnose(7, 2.5, math.inf, [], scaled=True) is None


def test_bad_steps_are_counted_without_a_good_one_in_between() -> None:
    """Catches a run that ends since ten batches of a million were bad."""
    assert count_consecutive([3, 7, 8, 9], 9) == 3
    assert count_consecutive([3, 7, 8, 9], 3) == 1
    assert count_consecutive([9, 8, 12, 7], 9) == 3
    assert count_consecutive([], 4) == 0
