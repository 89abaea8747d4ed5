"""Decide what follows a bad batch: stop, skip it, or rewind to the last checkpoint and skip it."""

import enum
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import HealthConfig
from pretrain.training.health import Fault, HealthLimits, UnhealthyError, count_consecutive

ADVICE = (
    "  to try: fork an earlier checkpoint (run.resume), or restart, with a lower optimizer.lr, a longer "
    "schedule.warmup_steps or a smaller optimizer.grad_clip"
)


class Response(enum.Enum):
    STOP = enum.auto()
    SKIP = enum.auto()
    REWIND = enum.auto()


class Recovery:
    """Applies `health.policy`."""

    def __init__(self, health: HealthConfig, limits: HealthLimits) -> None:
        self._policy = health.policy
        self._limits = limits
        self._rewinds = 0  # to the last checkpoint
        self._saved_step: int | None = None  # of that checkpoint

    def respond(self, fault: Fault, dumped: Path, bad_steps: Sequence[int], saved_step: int | None) -> Response:
        """What to do about a bad batch. Raises UnhealthyError if a limit is reached.

        Args:
            dumped: folder of the bad batch.
            bad_steps: known so far, without this one.
            saved_step: of the last checkpoint.
        """
        if saved_step != self._saved_step:
            self._saved_step, self._rewinds = saved_step, 0
        if self._policy == "stop":
            return Response.STOP
        what = f"{fault}\n  its batch: {dumped}"
        if count_consecutive((*bad_steps, fault.step), fault.step) >= self._limits.max_consecutive:
            raise UnhealthyError(
                f"{what}\n  the last {self._limits.max_consecutive} steps were all bad: the weights have probably "
                f"diverged\n{ADVICE}"
            )
        if self._policy == "skip":
            return Response.SKIP
        if self._rewinds >= self._limits.max_rewinds:
            raise UnhealthyError(
                f"{what}\n  the run has been rewound to step {saved_step} {self._rewinds} times\n{ADVICE}"
            )
        self._rewinds += 1
        return Response.REWIND
