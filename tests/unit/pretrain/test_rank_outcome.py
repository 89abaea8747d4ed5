from pathlib import Path

import pytest

from experiment.run_folder import Outcome, RunFolder
from pretrain.rank_outcome import record_outcome

DONE, FAILED, STOPPED = Outcome.DONE, Outcome.FAILED, Outcome.STOPPED


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([(1, FAILED), (0, FAILED)], 0),  # rank 0 failed because it lost rank 1
        ([(0, FAILED), (1, FAILED)], 0),
        ([(1, FAILED), (0, STOPPED)], 1),
        ([(1, DONE), (0, DONE)], 1),
        ([(0, DONE), (1, FAILED)], 0),
    ],
)
def test_which_rank_reports(tmp_path: Path, outcomes: list[tuple[int, Outcome]], kept: int) -> None:
    """Catches the message of a rank that failed because another one did, in place of the cause."""
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    for rank, outcome in outcomes:
        record_outcome(folder, outcome, f"from rank {rank}", rank)
    rank, outcome = outcomes[kept]
    assert folder.read_outcome() == (outcome, f"from rank {rank}")
