"""One process at a time writes to a run folder: the launch of a pretraining, or a fine-tuning.

The system releases the lock when the process ends, however it ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import filelock

from experiment.errors import UserError
from experiment.run_folder import RunFolder


@contextmanager
def lock_run(folder: RunFolder) -> Iterator[None]:
    """Raises UserError if another process uses the run folder, which must exist."""
    lock = filelock.FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"run.dir: another deepcloze process is using {folder.path}") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: RunFolder) -> bool:
    """Whether another process uses the run folder, which may not exist."""
    if not folder.lock.exists():
        return False
    try:
        with filelock.FileLock(folder.lock, timeout=0):
            return False
    except filelock.Timeout:
        return True
