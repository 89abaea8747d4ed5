import pytest

from pretrain.config import ScheduleConfig
from pretrain.training.schedules import learning_rate


def curve(steps: int, **fields: float) -> list[float]:
    schedule = ScheduleConfig.model_validate({"steps": steps, **fields})
    return [learning_rate(schedule, 2.0, step, steps) for step in range(steps)]


def test_linear_is_its_closed_form() -> None:
    """Catches a warmup that is off by one or begins with a lost step, and a decay that misses its end."""
    assert curve(10, warmup_steps=4) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 2 * 5 / 6, 2 * 4 / 6, 2 * 3 / 6, 2 * 2 / 6, 2 * 1 / 6]
    )


def test_the_floor_is_where_the_decay_would_arrive() -> None:
    """Catches min_lr_ratio applied as a clamp, or not at all."""
    assert curve(5, warmup_steps=1, min_lr_ratio=0.5) == pytest.approx([2.0, 2.0, 1.75, 1.5, 1.25])


@pytest.mark.parametrize("warmup", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("steps", [1, 7, 8])
def test_every_step_learns(warmup: int, steps: int) -> None:
    """Catches divisions by zero and rates of zero or above the peak, in runs shorter than their warmup."""
    assert all(0.0 < rate <= 2.0 for rate in curve(steps, warmup_steps=warmup))


def test_after_the_end_the_rate_stays_at_its_floor() -> None:
    """Catches negative rates where a finished run is continued with fewer steps in its config."""
    schedule = ScheduleConfig(steps=5, warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(schedule, 2.0, 9, 5) == pytest.approx(0.2)
