"""How a rank leaves its outcome for the launcher."""

import contextlib
import sys
from pathlib import Path

from experiment.errors import UserError
from experiment.run_folder import Outcome, RunFolder
from pretrain.config import PretrainConfig


def report_refusal(config: PretrainConfig, error: UserError, rank: int) -> None:
    """On rank 0, print a mistake that all ranks have raised, and record the outcome."""
    if rank == 0:
        print(f"deepcloze: {error}", file=sys.stderr, flush=True)
        record_outcome(RunFolder(Path(config.run.dir).absolute()), Outcome.REFUSED, str(error), rank)


def record_outcome(folder: RunFolder, outcome: Outcome, message: str, rank: int) -> None:
    """Write the outcome for the launcher: rank 0's, or that of the first rank that failed, which made others fail."""
    with contextlib.suppress(OSError):
        found = folder.read_outcome()
        if rank == 0:
            is_news = found is None or found[0] is not Outcome.FAILED or outcome is not Outcome.FAILED
        else:
            is_news = found is None and outcome is Outcome.FAILED
        if is_news:
            folder.write_outcome(outcome, message)
