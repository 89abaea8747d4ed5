"""Decide whether a step's batch is bad from its loss and gradient norm. Pure functions; `recovery` acts on them.

A batch is bad if its loss or gradient is not finite, or if its gradient norm is more than `spike_factor` times the
median of the recent norms. The norm is that of the gradient reduced over all ranks, and a loss that is not finite makes
it NaN (see `Engine.accumulate`): every rank decides the same, within the step, and the update is never applied.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from experiment.errors import AgreedFailureError

NORM_WINDOW = 128  # norms that the median is taken over


@dataclass(frozen=True)
class HealthLimits:
    """When to call a norm a spike at all, and when to give up."""

    min_norms: int = 20  # norms needed before one can count as a spike
    max_consecutive: int = 10  # bad batches in a row, after which the weights must be to blame
    max_rewinds: int = 10  # to the same checkpoint


HEALTH_LIMITS = HealthLimits()


class UnhealthyError(AgreedFailureError):
    """The batches are bad, the weights have diverged, or the replicas differ."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step. Its update was not applied."""

    step: int  # as in metrics.jsonl: counted from 1
    loss: float  # mean over the masked tokens of the global batch
    grad_norm: float
    median: float | None  # of the recent norms; None if there are none

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"step {self.step}: the loss is {self.loss}"
        if not math.isfinite(self.grad_norm):
            return f"step {self.step}: the gradient norm is {self.grad_norm}, the loss {self.loss:.4g}"
        assert self.median is not None
        return (
            f"step {self.step}: the gradient norm is {self.grad_norm:.4g}, {self.grad_norm / self.median:.3g} times "
            f"the median of the recent steps ({self.median:.4g}); the loss is {self.loss:.4g}"
        )


def norm_limit(norms: Sequence[float], spike_factor: float, limits: HealthLimits) -> float:
    """The largest gradient norm that is not a spike after these recent ones; infinite while there are too few."""
    if len(norms) < limits.min_norms:
        return math.inf
    if (middle := median(norms)) == 0:  # every norm would be a spike
        return math.inf
    return spike_factor * middle


def append_norm(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The recent norms after an applied update. Norms of bad batches are never added."""
    return (*norms, norm)[-NORM_WINDOW:]


def diagnose(step: int, loss: float, grad_norm: float, norms: Sequence[float], scaled: bool) -> Fault | None:
    """What is wrong with a step whose update was not applied; None for an ordinary fp16 overflow.

    `scaled`: the loss is scaled dynamically, so that gradients overflow now and then although the loss is finite.
    """
    if scaled and math.isfinite(loss) and not math.isfinite(grad_norm):
        return None
    return Fault(step, loss, grad_norm, median(norms) if norms else None)


def count_consecutive(bad_steps: Sequence[int], step: int) -> int:
    """How many consecutive steps up to and including `step` are bad."""
    bad, first = set(bad_steps), step
    while first in bad:
        first -= 1
    return step - first
