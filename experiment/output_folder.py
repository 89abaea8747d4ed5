"""Folders that a command writes: by one process at a time, and never over something else."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from experiment.errors import UserError
from experiment.file_locks import opened_lock
from experiment.files import created_parents, removed_on_error


class LockedError(UserError):
    """Another process is writing the folder."""


def is_free(folder: Path) -> bool:
    """Return whether the folder is missing or empty. Raises UserError for a link to such a folder: a finished folder
    cannot be renamed to it."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if free and folder.is_symlink():
        raise UserError(f"{folder} is a link to a folder that is empty or missing; name that folder instead")
    return free


def holds_result(folder: Path, file: str, key: str, kind: str) -> bool:
    """Return whether the folder has a result of this kind, and so this file; False if it is free. Raises UserError for
    anything else. key: of the folder, for messages."""
    if is_free(folder):
        return False
    if not (folder / file).is_file():
        raise UserError(f"{key} {folder} already holds something that is not {kind}; name a new folder")
    return True


@contextmanager
def lock_output(folder: Path, key: str) -> Iterator[None]:
    """Allow one process at a time to write a folder, whose missing parents are created. Raises LockedError if another
    one does, and UserError for `/`. On a disk without locks, it allows all. key: of the folder, for messages."""
    if not folder.name:
        raise UserError(f"{key} {folder}: expected a folder that can be created")
    path = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(created_parents(folder))
            lock = stack.enter_context(opened_lock(path))
        except FileNotFoundError as error:
            raise UserError(f"{key}: cannot write {folder}: {error.strerror}") from None
        if lock(0) is False:
            raise LockedError(f"{key} {folder}: another process is writing it")
        try:
            yield
        finally:
            # While it is held: whoever opens it later gets a new one, and finds the result.
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Let the block write the folder --output, at a path that this yields; it becomes `folder` when the block ends, and
    is removed if the block raises.

    Raises UserError if another process writes it or has written it, and OSError.
    """
    partial = folder.parent / f".{folder.name}.partial"
    with lock_output(folder, "--output"), removed_on_error(partial):
        if not is_free(folder):
            raise UserError(f"--output {folder} already holds something; name a new folder")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        is_here = folder.exists() and folder.samefile(os.curdir)
        yield partial
        partial.replace(folder)
        if is_here:
            os.chdir(folder)  # the one before is deleted, and relative paths would lead nowhere
