import os
import resource
from pathlib import Path

import pytest

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from pretrain.rank_process import run_rank
from pretrain.rank_report import RankReport


class Exited(BaseException):
    """Raised in place of the process's exit."""


def test_a_rank_raises_its_limit_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that runs out of file descriptors although the system allows more than the default of 1024."""

    def end(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", end)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = min(before[0], 512), before[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(Exited, match="0"):
            run_rank(lambda: Outcome.DONE, RankReport(RunFolder(tmp_path), 0))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
