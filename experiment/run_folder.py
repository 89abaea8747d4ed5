"""The run folder: names of all files that a run writes."""

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from experiment.errors import UserError
from experiment.files import create_json, write_json, write_text
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


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run. Creates nothing."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def launches(self) -> Path:
        return self.path / "launch.jsonl"

    @property
    def stop(self) -> Path:
        """Created by the user, or by the launcher on a signal: save a checkpoint and stop."""
        return self.path / "STOP"

    @property
    def outcome(self) -> Path:
        """{"outcome": …, "message": …}, written by rank 0 at the end or by the first rank that fails."""
        return self.path / "logs" / "outcome.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that writes to the folder, see `run_lock`."""
        return self.path / "logs" / "launch.lock"

    def bad_batch(self, step: int) -> Path:
        """Folder with a dump of the bad batch of this step."""
        return self.path / "health" / f"step-{step:08d}"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_record(self, rank: int) -> Path:
        """{"rank": …, "host": …, "pid": …, "exit": …}; the exit code of a rank that runs or was killed is null."""
        return self.logs / f"rank-{rank}.json"

    def reserve_outcome(self) -> None:
        """Reserve space for the outcome, in case the disk fills up."""
        write_text(self._reserved, " " * _RESERVED_BYTES)

    def write_outcome(self, outcome: Outcome, message: str = "") -> None:
        """Write the outcome; on a full disk, into the space that the launcher has reserved."""
        try:
            write_json(self.outcome, {"outcome": outcome.value, "message": message})
        except OSError:
            self._fill_reserved(outcome, message)

    def write_first_outcome(self, outcome: Outcome, message: str) -> None:
        """As `write_outcome`, unless a rank has written one."""
        try:
            create_json(self.outcome, {"outcome": outcome.value, "message": message})
        except OSError:
            if not self.outcome.exists():
                self._fill_reserved(outcome, message)

    def read_outcome(self) -> tuple[Outcome, str] | None:
        """The outcome and its message; None if the file is missing or damaged."""
        try:
            found = parse_json(self.outcome.read_text(encoding="utf-8"))
            return Outcome(found["outcome"]), str(found["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def _reserved(self) -> Path:
        return self.logs / ".outcome.reserved"

    def _fill_reserved(self, outcome: Outcome, message: str) -> None:
        short = json.dumps({"outcome": outcome.value, "message": message[:_SHORT_MESSAGE]}).encode()
        with self._reserved.open("r+b") as file:
            file.write(short.ljust(_RESERVED_BYTES))
        self._reserved.replace(self.outcome)


def open_run_folder(path: Path | str) -> RunFolder:
    """The run folder at `path`, created if needed. Raises UserError if it is not writable."""
    folder = RunFolder(Path(path).absolute())
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: cannot create the run folder {folder.path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character
        raise UserError(f"run.dir: cannot create the run folder {str(folder.path)!r}: {error}") from None
    if not os.access(folder.path, os.W_OK):
        raise UserError(f"run.dir: the run folder {folder.path} is not writable")
    return folder
