"""Sizes of global batches: batch warmup."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The number of sequences of each global batch of a stream, and thus its start.

    Batch warmup: over the first `warmup_steps` steps of the run, batches grow linearly to `sequences`; the batch of
    step k has about `sequences * (k + 1) / (warmup_steps + 1)`, at least one.
    """

    sequences: int
    warmup_steps: int = 0
    first_step: int = 0  # step of the run at which the stream starts

    def start(self, step: int) -> int:
        """S(step): the position in the stream at which the batch of this step of the run starts."""
        warm = max(self.first_step, min(step, self.warmup_steps))  # the last step with a growing batch
        triangle = (warm * (warm + 1) - self.first_step * (self.first_step + 1)) // 2
        grown = -(-self.sequences * triangle // (self.warmup_steps + 1))
        return max(warm - self.first_step, grown) + (step - warm) * self.sequences

    def end(self, positions: int) -> int:
        """Return the first step of the run at whose start `positions` positions of the stream have been read."""
        warm = max(self.first_step, self.warmup_steps)
        left = positions - self.start(warm)
        if left > 0:
            return warm + -(-left // self.sequences)
        return self.first_step + bisect_left(range(self.first_step, warm), positions, key=self.start)
