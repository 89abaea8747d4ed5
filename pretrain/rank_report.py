"""What a rank leaves for the launcher: the outcome of the run, and that this process has ended."""

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import UserError
from experiment.files import write_json
from experiment.outcome_file import Cause, Outcome, ReportedOutcome, write_first_outcome, write_outcome
from experiment.run_folder import RunFolder
from pretrain.config import PretrainConfig


@dataclass(frozen=True)
class RankReport:
    """Writes to the run folder, as far as it is writable."""

    folder: RunFolder
    rank: int

    def start(self) -> None:
        """Record this process. A record without an exit code means that the process was killed."""
        self._record(None)

    def begin_training(self) -> None:
        """Record that this rank now looks for stop requests itself."""
        self._record(None, training=True)

    def agree(self, ending: ReportedOutcome) -> None:
        """Record how the run ended, on which all ranks have agreed. Only rank 0 writes."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                write_outcome(self.folder, *ending)

    def announce_refusal(self, error: UserError) -> None:
        """Print and record a mistake that all ranks have raised. Only rank 0 does."""
        if self.rank == 0:
            print(f"deepcloze: {error}", file=sys.stderr, flush=True)
        self.agree(ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED))

    def fail(self, outcome: Outcome, message: str, cause: Cause | None) -> None:
        """Record an outcome that this rank alone knows of, unless another rank has failed before: losing that
        rank is why this one fails."""
        with contextlib.suppress(OSError):
            write_first_outcome(self.folder, outcome, message, cause)

    def end(self, exit_code: int) -> None:
        self._record(exit_code)

    def _record(self, exit_code: int | None, training: bool = False) -> None:
        process: dict[str, object] = {"rank": self.rank, "host": platform.node(), "pid": os.getpid()}
        process |= {"training": training, "exit": exit_code}
        with contextlib.suppress(OSError):
            write_json(self.folder.rank_record(self.rank), process)


def rank_report(config: PretrainConfig, rank: int) -> RankReport:
    return RankReport(RunFolder(Path(config.run.dir).absolute()), rank)
