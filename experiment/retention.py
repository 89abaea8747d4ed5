"""Which checkpoints of a run to keep."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from experiment.checkpoints import checkpoint_step, complete_checkpoints


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep."""

    keep_last: int
    keep_every: int | None = None  # also keep every step that is a multiple of this
    best: int | None = None  # also keep the best one, of this step


def apply_retention(checkpoints: Path, keep: Retention, newest: int) -> None:
    """Delete the checkpoints that need not be kept, and the leftovers of interrupted saves.

    newest: step of the checkpoint just saved. Checkpoints of later steps are damaged, or the run would have resumed
    from them; they are left alone and do not count towards `keep_last`.
    """
    for leftover in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    by_step = {checkpoint_step(path): path for path in complete_checkpoints(checkpoints)}
    for step in [step for step in by_step if step <= newest][: -keep.keep_last]:
        if step != keep.best and (keep.keep_every is None or step % keep.keep_every != 0):
            # Rename first: a kill while deleting must not leave a folder that looks complete.
            doomed = by_step[step].rename(checkpoints / f".{by_step[step].name}.partial")
            shutil.rmtree(doomed)
