import math
from itertools import product
from typing import Any

import pytest

from pretrain.schedule_config import ScheduleConfig
from pretrain.training.learning_rate import ends_early, learning_rate

NAMES = ["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "wsd"]


def rates(steps: int, **fields: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate({"steps": steps, **fields})
    return [learning_rate(schedule, 2.0, step, steps, 0.0) for step in range(steps)]


def rate_at(step: int, share: float, **fields: Any) -> float:
    schedule = ScheduleConfig.model_validate({"budget": "100s", **fields})
    return learning_rate(schedule, 2.0, step, None, 100 * share)


def test_linear_schedule() -> None:
    """Catches a warmup that is off by one or starts with a rate of 0, and a decay that does not reach its end."""
    assert rates(10, warmup_steps=4) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 2 * 5 / 6, 2 * 4 / 6, 2 * 3 / 6, 2 * 2 / 6, 2 * 1 / 6]
    )


@pytest.mark.parametrize(
    ("name", "fields", "form"),
    [
        ("cosine", {}, lambda step: 1 + math.cos(math.pi * (step - 4) / 36)),
        ("constant", {}, lambda step: 2.0),
        ("polynomial", {"power": 3.0}, lambda step: 2 * ((40 - step) / 36) ** 3),
        ("inverse_sqrt", {}, lambda step: 2 * math.sqrt(4 / step)),
        ("wsd", {}, lambda step: 2.0 if step < 36 else 2 * (1 - math.sqrt((step - 36) / 4))),
        ("wsd", {"decay_steps": 10}, lambda step: 2.0 if step < 30 else 2 * (1 - math.sqrt((step - 30) / 10))),
    ],
)
def test_schedules_equal_their_formulas(name: str, fields: dict[str, Any], form: Any) -> None:
    """Catches a curve that is shifted, does not start at the peak, or ends at another value."""
    expected = [0.5, 1.0, 1.5, 2.0, *(form(step) for step in range(4, 40))]
    assert rates(40, name=name, warmup_steps=4, **fields) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_rate_is_below_the_minimum(name: str) -> None:
    """Catches a schedule that ignores min_lr_ratio or does not decay to it."""
    schedule = ScheduleConfig.model_validate({"steps": 400, "name": name, "warmup_steps": 4, "min_lr_ratio": 0.25})
    after_warmup = [learning_rate(schedule, 2.0, step, 400, 0.0) for step in range(4, 401)]
    assert min(after_warmup) == pytest.approx(2.0 if name == "constant" else 0.5)
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_min_lr_ratio_is_the_end_of_the_decay() -> None:
    """Catches min_lr_ratio that is applied as a clamp, or not at all."""
    assert rates(5, warmup_steps=1, min_lr_ratio=0.5) == pytest.approx([2.0, 2.0, 1.75, 1.5, 1.25])


@pytest.mark.parametrize(
    ("name", "warmup"), [case for case in product(NAMES, (0, 1, 7, 8, 100)) if case != ("inverse_sqrt", 0)]
)
@pytest.mark.parametrize("steps", [1, 7, 8])
def test_every_step_has_a_positive_rate(name: str, warmup: int, steps: int) -> None:
    """Catches a division by zero and rates of 0 or above the peak, in runs shorter than their warmup or decay."""
    assert all(0.0 < rate <= 2.0 for rate in rates(steps, name=name, warmup_steps=warmup))


def test_the_rate_stays_at_its_minimum_after_the_end() -> None:
    """Catches negative rates if a finished run resumes with fewer steps in its config."""
    schedule = ScheduleConfig(steps=5, warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(schedule, 2.0, 9, 5, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize("fork", [30, 55, 90])
def test_a_decay_forked_from_a_stable_phase_starts_at_its_rate(fork: int) -> None:
    """Catches a learning rate that jumps at the fork."""
    decay = rates(fork + 25, name="wsd", warmup_steps=10, decay_steps=25)
    assert decay[: fork + 1] == pytest.approx(rates(1000, name="wsd", warmup_steps=10)[: fork + 1])
    assert decay[fork] == 2.0
    assert decay[fork:] == pytest.approx([2 * (1 - math.sqrt(step / 25)) for step in range(25)])


@pytest.mark.parametrize(
    ("name", "fractions"),  # at 0, 45, 90, 95 and 100 % of the budget
    [
        ("linear", [1.0, 0.55, 0.1, 0.05, 0.0]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * share) for share in (0.0, 0.45, 0.9, 0.95, 1.0)]),
        ("polynomial", [1.0, 0.55**2, 0.1**2, 0.05**2, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 1.0 - math.sqrt(0.5), 0.0]),
    ],
)
def test_a_time_budget_decays_by_the_clock(name: str, fractions: list[float]) -> None:
    """Catches a decay that follows the steps instead of the time spent, or does not reach its end."""
    for share, fraction in zip((0.0, 0.45, 0.9, 0.95, 1.0), fractions, strict=True):
        for step in (10, 123_456):
            rate = rate_at(step, share, name=name, warmup_steps=10, min_lr_ratio=0.1)
            assert rate == pytest.approx(2 * (0.1 + 0.9 * fraction), abs=1e-9)
    assert rate_at(4, 0.0, name=name, warmup_steps=10) == pytest.approx(1.0)
    assert rate_at(10, 1.2, name=name, warmup_steps=10) >= 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, "'steps' and 'epochs'"),
        ({}, "exactly one of"),
        ({"budget": "2 hours"}, "not a duration"),
        ({"steps": 5, "decay_steps": 2}, "belongs to the schedule 'wsd'"),
        ({"budget": "1h", "name": "wsd", "decay_steps": 2}, "belongs to the schedule 'wsd'"),
        ({"steps": 5, "name": "wsd", "decay_steps": 6}, "longer than the run of 5 steps"),
        ({"steps": 5, "name": "inverse_sqrt", "warmup_steps": 0}, "must not be 0"),
        ({"epochs": 1.0, "stages": ({},)}, "cannot be combined with 'epochs'"),
        ({"steps": 5, "stages": ({"steps": 5}, {})}, "leaves none of the run's 5"),
        ({"steps": 5, "stages": ({}, {"steps": 5})}, "only the last one may omit"),
        ({"steps": 5, "stages": ({"steps": 3}, {"steps": 3})}, "not the length of the run"),
    ],
)
def test_invalid_schedules_are_rejected(fields: dict[str, Any], message: str) -> None:
    """Catches a run with an undefined length or schedule that fails only after the launch."""
    with pytest.raises(ValueError, match=message):
        ScheduleConfig.model_validate(fields)


def test_a_budget_that_ends_before_the_decay() -> None:
    """Catches a run that ends at its peak rate silently, and a warning after a decay, or where there is none."""
    wsd = ScheduleConfig.model_validate({"budget": "100s", "name": "wsd", "min_lr_ratio": 0.1})
    assert [ends_early(wsd, 2.0, rate) for rate in (2.0, 0.8, 0.7, 0.2, 0.0)] == [True, True, False, False, False]
    others = {"budget": "100s", "name": "constant"}, {"steps": 10, "name": "wsd"}
    for fields in (*others, {"epochs": 0.5, "name": "wsd", "decay_steps": 5}):
        assert not ends_early(ScheduleConfig.model_validate(fields), 2.0, 2.0)
