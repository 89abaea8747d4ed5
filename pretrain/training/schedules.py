"""The learning rate as a function of the step."""

from pretrain.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of the update after `step` finished ones, of `steps` in all.

    Linear: it climbs in `warmup_steps` equal stairs to `peak`, the first of which is not zero, and falls in a straight
    line that would reach `min_lr_ratio * peak` at `steps`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    left = (steps - step) / max(1, steps - schedule.warmup_steps)
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * max(0.0, left))
