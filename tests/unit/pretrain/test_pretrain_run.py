"""How a rank exits when a run fails, without processes."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import pretrain.run
from experiment.outcome_file import Cause, Outcome, read_outcome
from experiment.run_folder import RunFolder
from pretrain.engine.initialization import LossScaleError
from pretrain.training.background_save import UnwritableError
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

    def fail(*_: Any, **__: Any) -> Outcome:
        raise LossScaleError("try a lower optimizer.lr")

    monkeypatch.setattr(pretrain.run, "connect", connect)
    monkeypatch.setattr(pretrain.run, "pretrain", fail)
    with pytest.raises(Exited, match="1"):
        pretrain.run.main(["--config", str(config)])
    assert timeouts == [timedelta(seconds=77)]
    assert read_outcome(RunFolder(tmp_path / "run"))[:2] == (Outcome.FAILED, "try a lower optimizer.lr")
    assert "Traceback" not in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_agreed_on() -> None:
    """Catches a launch that restarts its ranks although the disk is full for all of them."""

    def train(_: Any) -> Outcome:
        raise UnwritableError("disk full")

    trainer = SimpleNamespace(train=train, close=lambda _: None)
    group = SimpleNamespace(barrier=lambda: None)
    ending = pretrain.run._train(trainer, SimpleNamespace(ignore_second=lambda: None), group)  # type: ignore[arg-type]
    assert ending == (Outcome.STOPPED, "no checkpoint can be written: disk full", Cause.AGREED)
