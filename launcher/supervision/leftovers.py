"""Files of earlier launches, which a launch removes before it starts ranks."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from experiment.errors import notify
from experiment.files import remove_unfinished
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import CLOCK_SKEW


def remove_launch_leftovers(folder: RunFolder, checked_at: float) -> None:
    """Remove trials, unfinished files of killed processes of this machine, the output of a background launch, and
    a STOP file that is older than `checked_at`, when deepcloze began to check this launch, or dated in the future.
    Raises OSError for the STOP file."""
    if folder.stop.exists():
        with NamedTemporaryFile(dir=folder.logs) as file:
            now = Path(file.name).stat().st_mtime  # by the clock of the disk
        age = now - folder.stop.stat().st_mtime
        if not -CLOCK_SKEW < age <= time.time() - checked_at:
            folder.stop.unlink()
            notify(f"removed {folder.stop}, which is not from this launch by its date")
    shutil.rmtree(folder.trials, ignore_errors=True)  # of a command that was killed
    for written in (folder.path, folder.logs):
        remove_unfinished(written)
    remove_earlier_output(folder)


def remove_earlier_output(folder: RunFolder) -> None:
    """Remove the output of an earlier launch in the background, unless this process prints there."""
    with suppress(OSError):
        if not os.path.samestat(folder.launch_output.stat(), os.fstat(2)):
            folder.launch_output.unlink()
