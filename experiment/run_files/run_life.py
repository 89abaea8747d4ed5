"""Whether a run is alive, or how it ended, from the files in its folder, which may be a part of a copy."""

from dataclasses import dataclass
from typing import Literal

from experiment.formatting import describe_duration
from experiment.run_files.outcome_file import read_outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import folder_use

State = Literal["running", "done", "stopped", "failed", "refused", "killed", "unknown", "not started"]


@dataclass(frozen=True)
class Life:
    state: State
    host: str | None = None  # where it runs, or ran when it was killed or was last heard of
    message: str = ""


READERS = 64
"""Threads that read the lives of several runs: those on other machines wait for seconds."""


def read_life(folder: RunFolder) -> Life:
    """Read the state of a run. Takes seconds if it was last used on another machine, and has not ended properly."""
    if (use := folder_use(folder)).alive:
        return Life("running", use.host)
    outcome = read_outcome(folder)  # removed when an attempt starts
    if outcome is not None:
        return Life(outcome.outcome.value, None, outcome.message)
    if use.alive is None:
        since = describe_duration(use.silent_seconds)
        return Life("unknown", use.host, f"{use.host} has not renewed logs/{folder.owner.name} for {since}")
    if use.host is not None:
        return Life("killed", use.host)
    if folder.results.exists():  # a fine-tuning run of version 0.2.0
        return Life("done")
    if any(path.exists() for path in (folder.metrics, folder.launches, folder.rank_record(0))):
        return Life("unknown", None, "no file says whether it runs, or how it ended: is the folder a part of a copy?")
    return Life("not started")
