"""A lock for the folders in which torch builds DeepSpeed's kernels, which ends with the process that holds it.

torch 2.15 has such a lock itself. Earlier versions mark a folder with the file `lock` while they build, which takes a
minute or more. A process that is killed or stopped meanwhile leaves the file, and all later ones would wait forever for
its deletion.
"""

import math
from contextlib import ExitStack, suppress
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from experiment.file_locks import opened_lock


class KernelLock(FileBaton):
    """torch's lock file with a file lock beside it, whose holder deletes the lock file of an interrupted build.

    It cannot detect a running process that uses only torch's lock file, and deletes that file too.
    """

    def try_acquire(self) -> bool | None:
        """Wait for the file lock, take torch's and return True.

        On disks without file locks, such as Lustre without `-o flock`, and where another user has made the file, only
        try torch's.
        """
        self._held = ExitStack()
        try:
            lock = self._held.enter_context(opened_lock(Path(f"{self.lock_file_path}.held")))
        except OSError:
            return super().try_acquire()
        if lock(math.inf):
            Path(self.lock_file_path).unlink(missing_ok=True)
        acquired = super().try_acquire()
        if not acquired:
            self._held.close()
        return acquired

    def release(self) -> None:
        with self._held, suppress(FileNotFoundError):  # such a process has deleted it
            super().release()


def install_kernel_lock() -> None:
    """Use it for all kernels that this process loads from now on."""
    cpp_extension.FileBaton = KernelLock  # type: ignore[misc]
