"""Whether training can go on from this step's loss and gradient. Decisions only: the loop carries them out.

A batch is bad where its loss or gradient is not finite, or where the norm of its gradient is `spike_factor` times the
median of the recent ones. The norm is that of the gradient summed over all ranks, and a loss that is not finite makes
it NaN (see Engine.accumulate): so every rank sees the same, in the step itself, and the update is never applied.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 128  # the recent norms: those of so many applied updates
HISTORY = 20  # of them are needed before one can be far from the others
MOST_IN_A_ROW = 10  # bad batches one after another: then it is the weights that are bad
MOST_REWINDS = 10  # without a new checkpoint in between


class UnhealthyError(Exception):
    """The run cannot go on. Raised on all ranks in the same step; the message is for the user."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step. Its update was not applied."""

    step: int  # counted as in metrics.jsonl: the one that would have finished so many
    loss: float  # mean over the predicted tokens of the global batch
    grad_norm: float
    median: float | None  # of the recent norms; None while there are none

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"step {self.step}: the loss is {self.loss}"
        if not math.isfinite(self.grad_norm):
            return f"step {self.step}: the norm of the gradient is {self.grad_norm}, the loss {self.loss:.4g}"
        assert self.median is not None
        times = self.grad_norm / self.median
        return (
            f"step {self.step}: the norm of the gradient is {self.grad_norm:.4g}, {times:.3g} times the median of the "
            f"recent steps ({self.median:.4g}); the loss is {self.loss:.4g}"
        )


def norm_limit(norms: Sequence[float], spike_factor: float) -> float:
    """The largest norm that is no spike after these recent ones; infinite while they are too few."""
    return spike_factor * median(norms) or math.inf if len(norms) >= HISTORY else math.inf


def remember(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The recent norms after an applied update. Bad ones never enter, so a spike does not make room for the next."""
    return (*norms, norm)[-WINDOW:]


def diagnose(step: int, loss: float, grad_norm: float, norms: Sequence[float], scaled: bool) -> Fault | None:
    """What is wrong with a step whose update was not applied.

    `scaled`: the loss is scaled dynamically (fp16), whose gradients overflow now and then with a sound loss: None.
    """
    if scaled and math.isfinite(loss) and not math.isfinite(grad_norm):
        return None
    return Fault(step, loss, grad_norm, median(norms) if norms else None)


def in_a_row(skipped: Sequence[int], step: int) -> int:
    """How many steps up to and including `step` were bad, without a good one in between."""
    bad, first = set(skipped), step
    while first in bad:
        first -= 1
    return step - first
