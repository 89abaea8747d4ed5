"""The run folder: where everything a run writes stands, and under which name."""

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from experiment.errors import UserError
from experiment.files import write_json


class Outcome(StrEnum):
    """How a run ended, agreed by all ranks."""

    DONE = "done"
    STOPPED = "stopped"  # early, but resumable
    REFUSED = "refused"  # the user's mistake
    FAILED = "failed"

    @property
    def exit_code(self) -> int:
        return {Outcome.DONE: 0, Outcome.STOPPED: 75, Outcome.REFUSED: 2, Outcome.FAILED: 1}[self]


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of one run. Nothing is created before it is written."""

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
        """Made by the user (or the launcher, on a signal): save and stop."""
        return self.path / "STOP"

    @property
    def outcome(self) -> Path:
        """Written by the ranks when they end, read by the launcher: {"outcome": …, "message": …}."""
        return self.path / "logs" / "outcome.json"

    def bad_batch(self, step: int) -> Path:
        """What is known of a batch that training could not go on with."""
        return self.path / "health" / f"step-{step:08d}"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_outcome(self, outcome: Outcome, message: str = "") -> None:
        write_json(self.outcome, {"outcome": outcome.value, "message": message})

    def read_outcome(self) -> tuple[Outcome, str] | None:
        """What the ranks agreed on, or None where they ended without a word that can be read."""
        try:
            found = json.loads(self.outcome.read_text(encoding="utf-8"))
            return Outcome(found["outcome"]), str(found["message"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def open_run_folder(path: Path | str) -> RunFolder:
    """The run folder at `path`, made if needed. Raises UserError where it cannot be written to."""
    folder = RunFolder(Path(path).absolute())
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: cannot create the run folder {folder.path}: {error.strerror}") from None
    if not os.access(folder.path, os.W_OK):
        raise UserError(f"run.dir: the run folder {folder.path} is not writable")
    return folder
