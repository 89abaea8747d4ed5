import subprocess
from pathlib import Path

import pytest

from benchmarks import continuation
from benchmarks.continuation import RunSize


def best_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> tuple[str, Path]:
    """The best run of a sweep that ends with this exit code and leaves a table."""

    def sweep(*_: str) -> None:
        (tmp_path / "continued").mkdir()
        (tmp_path / "continued" / "sweep.csv").write_text("optimizer.lr,folder\n2e-4,run\n", encoding="utf-8")
        raise subprocess.CalledProcessError(code, "sweep")

    monkeypatch.setattr(continuation, "deepcloze", sweep)
    return continuation._best_run("continued", tmp_path, {}, RunSize(20, 2, 8), "2e-4")


def test_a_run_that_failed_does_not_end_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that ends because one learning rate diverges."""
    assert best_run(tmp_path, monkeypatch, 1) == ("2e-4", tmp_path / "continued" / "run")


@pytest.mark.parametrize("code", [2, 75, -9])
def test_a_rejected_or_stopped_sweep_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Catches a result of some of the learning rates only, or of an earlier sweep."""
    with pytest.raises(subprocess.CalledProcessError):
        best_run(tmp_path, monkeypatch, code)
