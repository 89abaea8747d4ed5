"""The run folder: names of all files that a run writes."""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from experiment.errors import UserError
from experiment.files import write_json
from experiment.strict_json import parse_json


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
        """{"outcome": …, "message": …}, written at the end by rank 0 or a rank that fails, read by the launcher."""
        return self.path / "logs" / "outcome.json"

    def bad_batch(self, step: int) -> Path:
        """Folder with a dump of the bad batch of this step."""
        return self.path / "health" / f"step-{step:08d}"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_outcome(self, outcome: Outcome, message: str = "") -> None:
        write_json(self.outcome, {"outcome": outcome.value, "message": message})

    def read_outcome(self) -> tuple[Outcome, str] | None:
        """The outcome and its message; None if the file is missing or damaged."""
        try:
            found = parse_json(self.outcome.read_text(encoding="utf-8"))
            return Outcome(found["outcome"]), str(found["message"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


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
