"""Remove files that earlier launches have left in the run folder. Only the launch that has locked the folder does."""

import os
import shutil
from contextlib import suppress

from experiment.run_folder import RunFolder
from launcher.messages import notify


def remove_leftovers(folder: RunFolder, checked_at: float) -> None:
    """Remove trials, the output of a launch in the background, and a STOP file that is older than `checked_at`, when
    deepcloze began to check this launch. Raises OSError for the STOP file."""
    if folder.stop.exists() and folder.stop.stat().st_mtime < checked_at:
        folder.stop.unlink()
        notify(f"removed {folder.stop}, which is older than this launch")
    shutil.rmtree(folder.trials, ignore_errors=True)  # of a command that was killed
    remove_earlier_output(folder)


def remove_earlier_output(folder: RunFolder) -> None:
    """Remove what an earlier launch in the background has printed, unless this process prints there."""
    with suppress(OSError):
        if not os.path.samestat(folder.launch_output.stat(), os.fstat(2)):
            folder.launch_output.unlink()
