import math
from itertools import product
from typing import Any

import pytest

from pretrain.config import ScheduleConfig
from pretrain.training.schedules import learning_rate

NAMES = ["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "wsd"]


def curve(steps: int, **fields: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate({"steps": steps, **fields})
    return [learning_rate(schedule, 2.0, step, steps, 0.0) for step in range(steps)]


def by_the_clock(step: int, share: float, **fields: Any) -> float:
    schedule = ScheduleConfig.model_validate({"budget": "100s", **fields})
    return learning_rate(schedule, 2.0, step, None, 100 * share)


def test_linear_is_its_closed_form() -> None:
    """Catches a warmup that is off by one or begins with a lost step, and a decay that misses its end."""
    assert curve(10, warmup_steps=4) == pytest.approx(
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
def test_a_schedule_is_its_closed_form(name: str, fields: dict[str, Any], form: Any) -> None:
    """Catches a curve that is shifted, begins beside the peak, or ends elsewhere than its definition says."""
    expected = [0.5, 1.0, 1.5, 2.0, *(form(step) for step in range(4, 40))]
    assert curve(40, name=name, warmup_steps=4, **fields) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_rate_falls_below_the_floor(name: str) -> None:
    """Catches min_lr_ratio that one schedule forgets, and a decay that does not arrive there."""
    schedule = ScheduleConfig.model_validate({"steps": 400, "name": name, "warmup_steps": 4, "min_lr_ratio": 0.25})
    after_warmup = [learning_rate(schedule, 2.0, step, 400, 0.0) for step in range(4, 401)]
    assert min(after_warmup) == pytest.approx(2.0 if name == "constant" else 0.5)
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_the_floor_is_where_the_decay_would_arrive() -> None:
    """Catches min_lr_ratio applied as a clamp, or not at all."""
    assert curve(5, warmup_steps=1, min_lr_ratio=0.5) == pytest.approx([2.0, 2.0, 1.75, 1.5, 1.25])


@pytest.mark.parametrize(
    ("name", "warmup"), [case for case in product(NAMES, (0, 1, 7, 8, 100)) if case != ("inverse_sqrt", 0)]
)
@pytest.mark.parametrize("steps", [1, 7, 8])
def test_every_step_learns(name: str, warmup: int, steps: int) -> None:
    """Catches divisions by zero and rates of zero or above the peak, in runs shorter than their warmup or decay."""
    assert all(0.0 < rate <= 2.0 for rate in curve(steps, name=name, warmup_steps=warmup))


def test_after_the_end_the_rate_stays_at_its_floor() -> None:
    """Catches negative rates where a finished run is continued with fewer steps in its config."""
    schedule = ScheduleConfig(steps=5, warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(schedule, 2.0, 9, 5, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize("fork", [30, 55, 90])
def test_a_decay_forked_from_a_stable_phase_begins_at_its_rate(fork: int) -> None:
    """Catches a decay that jumps where it leaves the run it was forked from."""
    decay = curve(fork + 25, name="wsd", warmup_steps=10, decay_steps=25)
    assert decay[: fork + 1] == pytest.approx(curve(1000, name="wsd", warmup_steps=10)[: fork + 1])
    assert decay[fork] == 2.0
    assert decay[fork:] == pytest.approx([2 * (1 - math.sqrt(step / 25)) for step in range(25)])


@pytest.mark.parametrize(
    ("name", "heights"),  # at 0, 45, 90, 95 and 100 % of the budget
    [
        ("linear", [1.0, 0.55, 0.1, 0.05, 0.0]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * share) for share in (0.0, 0.45, 0.9, 0.95, 1.0)]),
        ("polynomial", [1.0, 0.55**2, 0.1**2, 0.05**2, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 1.0 - math.sqrt(0.5), 0.0]),
    ],
)
def test_a_budget_is_spent_with_the_decay(name: str, heights: list[float]) -> None:
    """Catches a decay that follows the steps where only the clock knows how far the run is, or misses the end."""
    for share, height in zip((0.0, 0.45, 0.9, 0.95, 1.0), heights, strict=True):
        for step in (10, 123_456):
            rate = by_the_clock(step, share, name=name, warmup_steps=10, min_lr_ratio=0.1)
            assert rate == pytest.approx(2 * (0.1 + 0.9 * height), abs=1e-9)
    assert by_the_clock(4, 0.0, name=name, warmup_steps=10) == pytest.approx(1.0)
    assert by_the_clock(10, 1.2, name=name, warmup_steps=10) >= 0.0


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
def test_what_makes_no_schedule_is_refused(fields: dict[str, Any], message: str) -> None:
    """Catches a run whose length or curve nobody can tell, and that finds out on its devices."""
    with pytest.raises(ValueError, match=message):
        ScheduleConfig.model_validate(fields)
