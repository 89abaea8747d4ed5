"""How a rank exits when a run fails, without processes."""

import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import pretrain.run
from experiment.run_folder import Outcome, RunFolder
from pretrain.engine.loss_scaler import LossScaleError
from pretrain.world import World


class Exited(BaseException):
    """Raised in place of the process's exit."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def end(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", end)
    path = tmp_path / "run.yaml"
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "unused"},
        "schedule": {"steps": 2},
        "health": {"hang_seconds": 77},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def test_loss_scale_errors_exit_with_their_message(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a trace instead of advice, an outcome that is not recorded, and a hang_seconds that has no effect."""
    timeouts: list[timedelta] = []

    def connect(timeout: timedelta, _: Any) -> World:
        timeouts.append(timeout)
        return World(0, 1)

    def fail(*_: Any) -> Outcome:
        raise LossScaleError("try a lower optimizer.lr")

    monkeypatch.setattr(pretrain.run, "connect", connect)
    monkeypatch.setattr(pretrain.run, "pretrain", fail)
    with pytest.raises(Exited, match="1"):
        pretrain.run.main(["--config", str(config)])
    assert timeouts == [timedelta(seconds=77)]
    assert RunFolder(tmp_path / "run").read_outcome() == (Outcome.FAILED, "try a lower optimizer.lr")
    assert "Traceback" not in caplog.text


def test_a_rank_raises_its_limit_of_open_files(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that runs out of file descriptors although the system allows more than the default of 1024."""
    monkeypatch.setattr(pretrain.run, "connect", lambda *_: World(0, 1))
    monkeypatch.setattr(pretrain.run, "disconnect", lambda: None)
    monkeypatch.setattr(pretrain.run, "pretrain", lambda *_: Outcome.DONE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = min(before[0], 512), before[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(Exited, match="0"):
            pretrain.run.main(["--config", str(config)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
