"""Whether a run is alive, or how it ended, from the files in its folder, which may be a part of a copy."""

import platform
from dataclasses import dataclass
from typing import Literal

import psutil

from experiment.formatting import describe_duration
from experiment.run_files.outcome_file import read_outcome, read_rank_record
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
    return _life_of_rank0(folder)


def _life_of_rank0(folder: RunFolder) -> Life:
    """Return the state of a run that recorded no outcome, and whose folder no process has locked: in version 0.2.0,
    DeepSpeed's launcher started ranks that did not."""
    process = read_rank_record(folder, 0)
    if process is None and folder.results.exists():  # a fine-tuning run of version 0.2.0
        return Life("done")
    if process is None:
        if any(path.exists() for path in (folder.metrics, folder.launches)):
            return Life(
                "unknown", None, "no file says whether it runs, or how it ended: is the folder a part of a copy?"
            )
        return Life("not started")
    host = process.host
    if process.exit is not None:
        return Life("failed", host, "rank 0 ended without reporting an outcome")
    if host != platform.node():
        return Life("unknown", host, f"rank 0 has started as process {process.pid} on {host}, and not recorded its end")
    return Life("running" if psutil.pid_exists(process.pid) else "killed", host)
