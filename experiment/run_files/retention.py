"""Which checkpoints of a run to keep, and deleting the others."""

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from experiment.run_files.checkpoints import BEST, checkpoint_step, complete_checkpoints, named_best
from experiment.run_files.downstream import drop_results
from experiment.run_files.fillings import drop_fillings
from experiment.run_files.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    keep_last: int
    keep_every: int | None = None  # also keep every step that is a multiple of this, but 0
    best: int | None = None  # also keep the best one, of this step
    uploading: int | None = None  # also keep the one that is being copied to the mirror

    def is_milestone(self, step: int) -> bool:
        """Return whether `keep_every` keeps the checkpoint of this step."""
        return self.keep_every is not None and step > 0 and step % self.keep_every == 0

    def superseded(self, steps: Collection[int], newest: int) -> list[int]:
        """Return the steps of a run whose checkpoints need not be kept.

        newest: step of the checkpoint just saved. Checkpoints of later steps are damaged, or the run would have resumed
        from them; they are left alone and do not count towards `keep_last`.
        """
        return [
            step
            for step in sorted(step for step in steps if step <= newest)[: -self.keep_last]
            if step not in (self.best, self.uploading) and not self.is_milestone(step)
        ]


def apply_retention(checkpoints: Path, keep: Retention, newest: int, before: int | None = None) -> None:
    """Delete the checkpoints that need not be kept, and the leftovers of interrupted saves and deletions.

    newest: step of the checkpoint just saved, see `Retention.superseded`. before: step of the undamaged one before it,
    if any; those between them are damaged, or the run would have resumed from them, unless one is the best. Warns about
    checkpoints that cannot be deleted (open on a network file system, immutable); the next call tries again.
    """
    remove_leftovers(checkpoints)
    best = named_best(checkpoints)  # an earlier one than `keep.best` if that could not be saved
    by_step = {checkpoint_step(path): path for path in complete_checkpoints(checkpoints)}
    damaged = [step for step in by_step if before is not None and before < step < newest and step != keep.best]
    for step in damaged:
        abandon(by_step[step])
    for step in keep.superseded(by_step.keys() - damaged, newest):
        if by_step[step] != best:
            discard(by_step[step])


def remove_leftovers(checkpoints: Path) -> None:
    """Delete leftovers of interrupted saves and deletions."""
    for leftover in checkpoints.glob(".step-*.partial"):
        _delete(leftover)


def abandon(checkpoint: Path) -> None:
    """Delete a checkpoint that the run does not continue from, also if `RUN/checkpoints/best` names it."""
    if named_best(checkpoint.parent) == checkpoint:
        (checkpoint.parent / BEST).unlink()
    discard(checkpoint)


def drop_scores(folder: RunFolder, last_step: int) -> None:
    """Delete the scores of abandoned checkpoints, those of steps after `last_step`. Warns if they cannot be deleted."""
    try:
        drop_results(folder, last_step)
        drop_fillings(folder, last_step)
    except OSError as error:
        log.warning("cannot delete the scores of abandoned checkpoints: %s", error)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, complete or not. Warns if it cannot be deleted; `apply_retention` tries again."""
    # Rename first: a kill while deleting must not leave a folder that looks complete. The name differs from the name of
    # a save in progress, which a folder that cannot be deleted must not block.
    doomed = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}.deleted.partial")
    try:
        checkpoint.rename(doomed)
    except OSError as error:
        _warn(checkpoint, error)
    else:
        _delete(doomed)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # delete the rest: the disk may be full
        _warn(folder, error)


def _warn(folder: Path, error: OSError) -> None:
    log.warning("cannot delete %s, the next save tries again: %s", folder, error.strerror)
