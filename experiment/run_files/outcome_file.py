"""The files in which the ranks of a run write how it, and each of their processes, ended. The launcher reads them.

1. RUN/logs/outcome.json, a `ReportedOutcome`: written by rank 0 at the end, or by the first rank that fails. Other
   commands write it, too (`recorded_outcome`).
2. RUN/logs/rank-N.json, a `RankRecord`: written by each rank when it starts, begins to train, and ends.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Self

from experiment.errors import StoppedError, UserError
from experiment.files import create_json, exists_uncached, parse_record, read_json, write_json, write_text
from experiment.run_files.run_folder import RunFolder

BEFORE_FIRST_STEP = "before the first step"
"""In the message of a rank that is stopped before it trains."""

_RESERVED_BYTES = 4096
_PLACE = re.compile(r"(\S+), rank \d+: (?!.*\brank \d+: )", re.DOTALL)
_SHORT_MESSAGE = 300  # characters, of at most 12 bytes each in JSON


class Outcome(StrEnum):
    """The outcome of a run; the same on all ranks."""

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
    LOST_RANK = "lost_rank"  # a collective failed, or the launcher could not use the run folder
    SIGNAL = "signal"  # a rank was asked to stop
    KILLED = "killed"  # a signal killed a rank
    LOST_HOST = "lost_host"  # a host, or its disk or GPU, was lost
    HUNG = "hung"  # a rank made no progress
    ERROR = "error"  # anything else


class ReportedOutcome(NamedTuple):
    outcome: Outcome
    message: str
    cause: Cause | None = None  # None: done


def host_of(message: str) -> str | None:
    """Return the host of a message that begins with the host and number of a rank; None if it quotes another rank."""
    place = _PLACE.match(message)
    return place[1] if place else None


def reserve_outcome(folder: RunFolder) -> None:
    """Reserve space for the outcome, in case the disk fills up."""
    write_text(folder.reserved_outcome, " " * _RESERVED_BYTES)


def write_outcome(folder: RunFolder, outcome: Outcome, message: str = "", cause: Cause | None = None) -> None:
    """Write the outcome; on a full disk, into the space that the launcher has reserved."""
    reported = ReportedOutcome(outcome, message, cause)
    try:
        write_json(folder.outcome, reported._asdict())
    except OSError:
        short = json.dumps(reported._replace(message=message[:_SHORT_MESSAGE])._asdict()).encode()
        with folder.reserved_outcome.open("r+b") as file:
            file.write(short.ljust(_RESERVED_BYTES))
        folder.reserved_outcome.replace(folder.outcome)


def write_first_outcome(folder: RunFolder, outcome: Outcome, message: str, cause: Cause | None = None) -> None:
    """Write an outcome as `write_outcome` does, unless a rank has written one."""
    try:
        create_json(folder.outcome, ReportedOutcome(outcome, message, cause)._asdict())
    except OSError:
        if not folder.outcome.exists():
            write_outcome(folder, outcome, message, cause)


@contextmanager
def recorded_outcome(folder: RunFolder) -> Iterator[None]:
    """Record how the block ends, for a command of one process."""
    folder.outcome.unlink(missing_ok=True)
    reported = ReportedOutcome(Outcome.DONE, "")
    try:
        yield
    except (KeyboardInterrupt, StoppedError) as error:
        reported = ReportedOutcome(Outcome.STOPPED, str(error) or "interrupted; run the same command again to resume")
        raise
    except UserError as error:
        reported = ReportedOutcome(Outcome.REFUSED, str(error))
        raise
    except SystemExit as ending:
        reported = ReportedOutcome(Outcome.FAILED, str(ending.code).removeprefix("deepcloze: "))
        raise
    except BaseException as error:
        reported = ReportedOutcome(Outcome.FAILED, f"{type(error).__name__}: {error}")
        raise
    finally:
        with suppress(OSError):
            write_outcome(folder, *reported)


def read_outcome(folder: RunFolder) -> ReportedOutcome | None:
    """Return the outcome that the ranks reported; None if the file is missing or damaged."""
    try:
        found = read_json(folder.outcome)
        cause = None if found["cause"] is None else Cause(found["cause"])
        return ReportedOutcome(Outcome(found["outcome"]), str(found["message"]), cause)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class RankRecord:
    rank: int
    host: str
    pid: int
    training: bool = False  # it looks for stop requests itself
    exit: int | None = None  # its exit code; None: it runs, or was killed

    def write(self, folder: RunFolder) -> None:
        """Write the record. Raises OSError."""
        write_json(folder.rank_record(self.rank), asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Ignore unknown keys, which another version may write. Raises OSError, and ValueError for a damaged file."""
        return parse_record(cls, path.read_bytes())


def read_rank_record(folder: RunFolder, rank: int) -> RankRecord | None:
    """Read the record of a rank; None if it is missing or damaged."""
    record = folder.rank_record(rank)
    with suppress(OSError, ValueError):
        return RankRecord.read(record) if exists_uncached(record) else None
    return None


def read_rank_records(folder: RunFolder) -> list[RankRecord]:
    """Read the records of all ranks that have started, in the order of their files. Skips damaged ones."""
    found = []
    for path in sorted(rank_records(folder)):
        with suppress(OSError, ValueError):
            found.append(RankRecord.read(path))
    return found


def rank_records(folder: RunFolder) -> Iterator[Path]:
    """Return the files of the ranks that have started."""
    return folder.logs.glob("rank-*.json")
