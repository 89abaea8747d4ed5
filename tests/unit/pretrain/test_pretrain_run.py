"""What a rank reads from its command line, and how it exits when a run fails, without processes."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import pretrain.run
from experiment.errors import AgreedFailureError, UserError
from experiment.process.own_process import LAUNCH_VARIABLE, START_VARIABLE
from experiment.run_files.outcome_file import Cause, Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from pretrain.engine.process_group import LostRankError
from pretrain.run import read_arguments
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

    def connect(timeout: timedelta, *_: Any) -> World:
        timeouts.append(timeout)
        return World(0, 1)

    def fail(*_: Any, **__: Any) -> Outcome:
        raise AgreedFailureError("try a lower optimizer.lr")

    monkeypatch.setattr(pretrain.run, "connect", connect)
    monkeypatch.setattr(pretrain.run, "pretrain", fail)
    with pytest.raises(Exited, match="1"):
        pretrain.run.main(["--config", str(config)])
    assert timeouts == [timedelta(seconds=77)]
    assert read_outcome(RunFolder(tmp_path / "run"))[:2] == (Outcome.FAILED, "try a lower optimizer.lr")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_without_ranks_are_rejected(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Catches processes of srun or mpirun, as of `deepspeed --launcher slurm`, each of which trains alone."""

    def connect(*_: Any) -> World:
        raise LostRankError("not connected")

    def exit_code(**environ: str) -> int:
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(Exited) as exited:
            pretrain.run.main(["--config", str(config)])
        return exited.value.args[0]

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(pretrain.run, "connect", connect)
    assert exit_code(**{name: "16"}) == 2
    assert f"has started it several times, {name} is 16, but RANK is not set; start" in capsys.readouterr().err
    assert exit_code(**{name: "1"}) == 1
    assert exit_code(**{name: "16"}, RANK="0") == 1


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_that_deepspeed_starts_writes_nothing_until_it_has_met_rank_0(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: bool
) -> None:
    """Catches a second start that is refused, but changes the records by which the launch of the first one watches its
    ranks, and a rank that fails to connect to the others, but does not record it."""
    logs = open_run_folder(tmp_path / "run").logs
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(LAUNCH_VARIABLE, raising=False)
    monkeypatch.delenv(START_VARIABLE, raising=False)
    if launched:
        monkeypatch.setenv(START_VARIABLE, "0")

    def files(connect: Callable[..., World]) -> set[str]:
        monkeypatch.setattr(pretrain.run, "connect", connect)
        with pytest.raises(Exited, match="1"):
            pretrain.run.main(["--config", str(config)])
        return {path.name for path in logs.iterdir()}

    def lose_rank_0(*_: Any) -> World:
        raise LostRankError("not connected: rank 0")

    def lose_network(_: timedelta, __: object, on_met: Callable[[], None]) -> World:
        on_met()
        raise RuntimeError("NCCL error")

    written = {"outcome.json", "processes.lock", "rank-1.json", "rank-1.log"}
    assert files(lose_rank_0) - {"rank-1.beat"} == (written if launched else set())
    assert files(lose_network) - {"rank-1.beat"} == written


def test_a_checkpoint_that_cannot_be_written_is_agreed_on() -> None:
    """Catches a launch that restarts its ranks although the disk is full for all of them."""

    def train(_: Any) -> Outcome:
        raise UnwritableError("disk full")

    trainer = SimpleNamespace(train=train, close=lambda _: None)
    group = SimpleNamespace(barrier=lambda: None)
    ending = pretrain.run._train(trainer, SimpleNamespace(ignore_second=lambda: None), group)  # type: ignore[arg-type]
    assert ending == (Outcome.STOPPED, "no checkpoint can be written: disk full", Cause.AGREED)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: RUN}\nmodel: {config: {model_type: bert}}\ncorpus: {train: DIR}\nschedule: {steps: 5}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("argv", "steps", "name"),
    [
        (["--config", "{file}"], 5, None),
        (["--config={file}", "--schedule.steps=7"], 7, None),
        (["--schedule.steps", "7", "--config", "{file}"], 7, None),
        (["--local_rank=3", "--config={file}", "--tracking.name=1e-3"], 5, "1e-3"),
        (["--local_rank", "3", "--config={file}", "--tracking.name", "a=b"], 5, "a=b"),
        (["--config={file}", "--tracking.name=a=b"], 5, "a=b"),
    ],
)
def test_both_forms_of_a_flag_are_read(file: str, argv: list[str], steps: int, name: str | None) -> None:
    """Catches an order or a form of flags that is not read, DeepSpeed's --local_rank taken for a config key, and values
    cut at an equals sign."""
    config = read_arguments([argument.format(file=file) for argument in argv])
    assert (config.schedule.steps, config.tracking.name) == (steps, name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config FILE is missing"),
        (["--schedule.steps=7"], "--config FILE is missing"),
        (["--config"], "--config needs a value"),
        (["--config={file}", "--schedule.steps"], r"--schedule\.steps needs a value"),
        (["--config={file}", "schedule.steps=7"], r"unexpected argument 'schedule\.steps'"),
        (["{file}"], "unexpected argument"),
        (["--config={file}", "--schedule.stps=7"], r"schedule\.stps"),
    ],
)
def test_malformed_arguments_are_rejected(file: str, argv: list[str], message: str) -> None:
    """Catches a trace for a mistyped command, and an override that is ignored."""
    with pytest.raises(UserError, match=message):
        read_arguments([argument.format(file=file) for argument in argv])
