"""The learning rate: a function of the step, or, under a time budget, of the step and the fraction of it spent.

Batch warmup is in `pretrain/batching/order.py`, stages in `pretrain/training_stream.py`.
"""

import math

from pretrain.schedule_config import ScheduleConfig

_UNDECAYED = 0.3  # of the decay: less may be left where a step takes a tenth of a budget


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int | None, seconds: float) -> float:
    """Return the learning rate of step `step` (from 0).

    Linear warmup over `warmup_steps` to `peak`; the first rate is not zero. Then a decay to `min_lr_ratio * peak`,
    which would be reached at step `steps`. Under a time budget the decay depends only on the fraction of the budget
    spent, so that a schedule which decays from the start is slightly below its peak at the end of the warmup.

    Args:
        steps: in the whole run; None under a time budget.
        seconds: of training so far.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "inverse_sqrt":  # independent of the run's length, so min_lr_ratio is a lower bound
        height = math.sqrt(schedule.warmup_steps / max(schedule.warmup_steps, step))
        return peak * warmup * max(schedule.min_lr_ratio, height)
    done = _decay_fraction(schedule, step, steps, seconds)
    floor = schedule.min_lr_ratio
    return peak * warmup * (floor + (1.0 - floor) * _height(schedule, done))


def ends_early(schedule: ScheduleConfig, peak: float, rate: float) -> bool:
    """Return whether a time budget has ended well above the end of its decay: a step, an evaluation or a pause took
    longer than the decay. rate: of the last step but one; the last step begins after the end of the budget."""
    if schedule.budget_seconds is None or schedule.name in ("constant", "inverse_sqrt"):
        return False
    floor = schedule.min_lr_ratio * peak
    return rate - floor > _UNDECAYED * (peak - floor)


def _decay_fraction(schedule: ScheduleConfig, step: int, steps: int | None, seconds: float) -> float:
    """Fraction of the decay that is done: 0 at the peak, 1 at the floor."""
    if steps is None:
        assert schedule.budget_seconds is not None
        spent, begin, end = seconds / schedule.budget_seconds, 0.9 if schedule.name == "wsd" else 0.0, 1.0
    else:
        spent, begin, end = step, schedule.warmup_steps, steps
        if schedule.name == "wsd":
            begin = max(begin, end - (schedule.decay_steps or round(0.1 * end)))
    return min(1.0, max(0.0, (spent - begin) / max(end - begin, 1e-9)))


def _height(schedule: ScheduleConfig, done: float) -> float:
    """Height of the decay curve between floor (0) and peak (1)."""
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine":  # Loshchilov and Hutter 2017, "SGDR"
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "polynomial":
            return math.pow(1.0 - done, schedule.power)
        case "wsd":
            # Hu et al. 2024 (MiniCPM) decay exponentially; Hägele et al. 2024, "Scaling laws and compute-optimal
            # training beyond fixed training durations", find 1 - sqrt consistently better than linear.
            return 1.0 - math.sqrt(done)
        case _:
            return 1.0 - done
