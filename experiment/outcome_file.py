"""The file in which the ranks of a run write how it ended, and where the launcher reads it.

Contains {"outcome": …, "message": …, "cause": …}: written by rank 0 at the end, or by the first rank that fails.
"""

import json
from enum import StrEnum
from typing import NamedTuple

from experiment.files import create_json, parse_json, write_json, write_text
from experiment.run_folder import RunFolder

_RESERVED_BYTES = 4096
_SHORT_MESSAGE = 300  # characters, of at most 12 bytes each in JSON


class Outcome(StrEnum):
    """How a run ended; the same on all ranks."""

    DONE = "done"
    STOPPED = "stopped"  # early; can be resumed
    REFUSED = "refused"  # a mistake of the user
    FAILED = "failed"

    @property
    def exit_code(self) -> int:
        return {Outcome.DONE: 0, Outcome.STOPPED: 75, Outcome.REFUSED: 2, Outcome.FAILED: 1}[self]


class Cause(StrEnum):
    """Why a run failed, or stopped because it was asked to; decides whether it is restarted."""

    AGREED = "agreed"  # all ranks decided it: they would again
    OUT_OF_MEMORY = "out_of_memory"  # of the device
    LOST_RANK = "lost_rank"  # a collective failed
    SIGNAL = "signal"  # a rank was asked to stop
    KILLED = "killed"  # a rank was
    LOST_HOST = "lost_host"
    HUNG = "hung"  # a rank made no progress
    ERROR = "error"  # anything else


class ReportedOutcome(NamedTuple):
    """What the ranks reported."""

    outcome: Outcome
    message: str
    cause: Cause | None = None  # None: done


def reserve_outcome(folder: RunFolder) -> None:
    """Reserve space for the outcome, in case the disk fills up."""
    write_text(folder.reserved_outcome, " " * _RESERVED_BYTES)


def write_outcome(folder: RunFolder, outcome: Outcome, message: str = "", cause: Cause | None = None) -> None:
    """Write the outcome; on a full disk, into the space that the launcher has reserved."""
    reported = ReportedOutcome(outcome, message, cause)
    try:
        write_json(folder.outcome, reported._asdict())
    except OSError:
        _fill_reserved(folder, reported)


def write_first_outcome(folder: RunFolder, outcome: Outcome, message: str, cause: Cause | None = None) -> None:
    """Write an outcome as `write_outcome` does, unless a rank has written one."""
    reported = ReportedOutcome(outcome, message, cause)
    try:
        create_json(folder.outcome, reported._asdict())
    except OSError:
        if not folder.outcome.exists():
            _fill_reserved(folder, reported)


def read_outcome(folder: RunFolder) -> ReportedOutcome | None:
    """What the ranks reported; None if the file is missing or damaged."""
    try:
        found = parse_json(folder.outcome.read_text(encoding="utf-8"))
        cause = None if found["cause"] is None else Cause(found["cause"])
        return ReportedOutcome(Outcome(found["outcome"]), str(found["message"]), cause)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fill_reserved(folder: RunFolder, reported: ReportedOutcome) -> None:
    short = json.dumps(reported._replace(message=reported.message[:_SHORT_MESSAGE])._asdict()).encode()
    with folder.reserved_outcome.open("r+b") as file:
        file.write(short.ljust(_RESERVED_BYTES))
    folder.reserved_outcome.replace(folder.outcome)
