import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks import continuation, measuring


def best_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> tuple[str, Path]:
    """The best run of a sweep that ends with this exit code and leaves a table."""

    def sweep(*_: str) -> None:
        (tmp_path / "continued").mkdir()
        (tmp_path / "continued" / "sweep.csv").write_text("optimizer.lr,folder\n2e-4,run\n", encoding="utf-8")
        raise subprocess.CalledProcessError(code, "sweep")

    monkeypatch.setattr(continuation, "deepcloze", sweep)
    return continuation._best_run("continued", tmp_path, {}, {}, "2e-4")


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


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_not_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    """Catches figures of a CPU that emulates bf16, which is several times slower than fp32 there."""
    monkeypatch.setattr(measuring, "has_native_bf16", lambda _: native)
    config = continuation._write_config(tmp_path / "large.yaml", tmp_path, {}, {})
    assert yaml.safe_load(config.read_text())["engine"]["ds_config"] == f"ds_configs/{precision}_zero1.json"
