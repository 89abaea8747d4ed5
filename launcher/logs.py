"""`deepcloze logs`: shows the output of a run, and follows it."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from experiment.errors import UserError
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import Owner
from launcher.options import LogsOptions
from launcher.status import find_run

_POLL_SECONDS = 0.5
_LAST_LINES = 20
_TAIL_BYTES = 1 << 14
_RANK_LOG = re.compile(r"rank-(\d+)\.log")


def print_logs(options: LogsOptions) -> None:
    """Print a log. Raises UserError if there is no such run, or no such log."""
    folder = find_run(options.run)
    try:
        with log_file(folder, options.rank).open("rb") as file:
            if options.follow:
                follow(file, Owner(folder).is_alive)
            else:
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.flush()
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # of a pager that was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the output of Python when it exits


def log_file(folder: RunFolder, rank: int | None) -> Path:
    """Return the file to show, see `LogsOptions.rank`. Raises UserError if there is none."""
    path, output = folder.rank_log(rank or 0), folder.launch_output
    if rank is None and output.is_file() and (output.stat().st_size or not path.is_file()):  # empty after --quiet
        return output
    if not path.is_file():
        found = sorted(int(match[1]) for path in folder.logs.glob("*") if (match := _RANK_LOG.fullmatch(path.name)))
        known = ", ".join(map(str, found)) or "none"
        raise UserError(f"{folder.path} has no log of rank {rank or 0}; ranks with a log: {known}")
    return path


def follow(file: IO[bytes], may_grow: Callable[[], bool]) -> None:
    """Print the last lines of a file, and new ones until it cannot grow any more."""
    file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
    new = b"".join(file.read().splitlines(keepends=True)[-_LAST_LINES:])
    has_ended = False
    while True:
        sys.stdout.buffer.write(new)
        sys.stdout.flush()
        if has_ended:
            return
        has_ended = not may_grow()  # before the last look at the file
        new = file.read()
        if not new and not has_ended:
            time.sleep(_POLL_SECONDS)
