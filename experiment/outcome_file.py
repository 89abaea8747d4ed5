"""The file in which the ranks of a run write how it ended, and where the launcher reads it.

Contains {"outcome": …, "message": …}: written by rank 0 at the end, or by the first rank that fails.
"""

import json
from enum import StrEnum

from experiment.files import create_json, write_json, write_text
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json

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


def reserve_outcome(folder: RunFolder) -> None:
    """Reserve space for the outcome, in case the disk fills up."""
    write_text(folder.reserved_outcome, " " * _RESERVED_BYTES)


def write_outcome(folder: RunFolder, outcome: Outcome, message: str = "") -> None:
    """Write the outcome; on a full disk, into the space that the launcher has reserved."""
    try:
        write_json(folder.outcome, {"outcome": outcome.value, "message": message})
    except OSError:
        _fill_reserved(folder, outcome, message)


def write_first_outcome(folder: RunFolder, outcome: Outcome, message: str) -> None:
    """As `write_outcome`, unless a rank has written one."""
    try:
        create_json(folder.outcome, {"outcome": outcome.value, "message": message})
    except OSError:
        if not folder.outcome.exists():
            _fill_reserved(folder, outcome, message)


def read_outcome(folder: RunFolder) -> tuple[Outcome, str] | None:
    """The outcome and its message; None if the file is missing or damaged."""
    try:
        found = parse_json(folder.outcome.read_text(encoding="utf-8"))
        return Outcome(found["outcome"]), str(found["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fill_reserved(folder: RunFolder, outcome: Outcome, message: str) -> None:
    short = json.dumps({"outcome": outcome.value, "message": message[:_SHORT_MESSAGE]}).encode()
    with folder.reserved_outcome.open("r+b") as file:
        file.write(short.ljust(_RESERVED_BYTES))
    folder.reserved_outcome.replace(folder.outcome)
