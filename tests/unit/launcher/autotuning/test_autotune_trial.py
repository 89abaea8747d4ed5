import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from experiment.config import build_config, dump_config
from experiment.outcome_file import Cause, Outcome, write_outcome
from experiment.run_folder import RunFolder
from launcher.autotuning import autotune_trial
from launcher.autotuning.autotune import is_enough
from launcher.autotuning.autotune_trial import Speed, TrialRunner, measured_speeds, trial_config
from launcher.hosts.machine import Devices, Machine
from launcher.launch_plan import LaunchPlan
from launcher.options import PretrainOptions
from launcher.supervision.attempt import Launch, Layout
from launcher.supervision.launch_result import AttemptRecord, LaunchResult
from launcher.supervision.stop_signals import StopSignals
from pretrain.config import PretrainConfig
from waiting import wait_until

STEPS = autotune_trial.WARMUP_STEPS + autotune_trial.MEASURED_STEPS
FULL = LaunchResult(Outcome.FAILED, "OutOfMemoryError", Cause.OUT_OF_MEMORY)
DONE = LaunchResult(Outcome.DONE)


def config(folder: Path, **changes: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder), "resume": "checkpoints/other", "seed": 3, "profile": True},
        "model": {"config": {"model_type": "bert"}, "freeze": ["embeddings"], "freeze_steps": 9},
        "corpus": {"train": "c", "eval": {"held_out": "d"}},
        "batch": {"sequences": 16, "max_seq_length": 100, "microbatch_tokens": 400},
        "masking": {"rate": [0.3, 0.15], "schedule": "linear"},
        "schedule": {"name": "wsd", "steps": 100, "decay_steps": 50, "batch_warmup_steps": 50},
        "evaluation": {"best_metric": "eval/held_out/loss", "patience": 2},
        "checkpoint": {"every_steps": 1, "every_minutes": 1},
        "health": {"policy": "rewind"},
        "tracking": {"wandb": "online"},
    }
    return build_config(PretrainConfig, tree | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": {"epochs": 3}},
        {"schedule": {"tokens": 1e9, "name": "inverse_sqrt"}},
        {"schedule": {"budget": "24h"}, "masking": {"rate": 0.3}},
    ],
)
def test_a_trial_is_a_valid_run_that_writes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Catches a config that the ranks reject, and a trial that evaluates, saves, reports, profiles or starts from
    elsewhere."""
    trial = trial_config(config(tmp_path, **changes), range(-1, 2), RunFolder(tmp_path / "trial"))
    (tmp_path / "trial.yaml").write_text(dump_config(trial))
    assert build_config(PretrainConfig, trial.model_dump(mode="json")) == trial
    assert (trial.run.dir, trial.run.resume, trial.run.log_every) == (str(tmp_path / "trial"), "auto", 1)
    assert not trial.run.profile
    assert (trial.corpus.eval, trial.evaluation.best_metric) == ({}, None)
    assert (trial.checkpoint.every_steps, trial.checkpoint.every_minutes, trial.health.policy) == (None, None, "stop")
    assert (trial.tracking.wandb, trial.model.freeze, trial.masking.rates) == ("disabled", (), (0.3,))
    assert [stage.microbatch_tokens for stage in trial.stages] == [200, 400, 800]
    assert [stage.first_step for stage in trial.stages] == [0, STEPS, 2 * STEPS]
    assert {stage.sequences for stage in trial.stages} == {16}


def test_a_trial_trains_each_stage_of_the_run_with_each_size(tmp_path: Path) -> None:
    """Catches a size that fits in the first stage, but not in a later one with longer sequences."""
    stages = [{"steps": 90, "max_seq_length": 50, "microbatch_tokens": 200}, {"max_seq_length": 100, "sequences": 8}]
    given = config(tmp_path, schedule={"steps": 100, "stages": stages})
    trial = trial_config(given, range(2), RunFolder(tmp_path / "trial"))
    found = [(stage.max_seq_length, stage.sequences, stage.microbatch_tokens) for stage in trial.stages]
    assert found == [(50, 16, 200), (100, 8, 400), (50, 16, 400), (100, 8, 800)]


def events(*speeds: float) -> list[dict[str, Any]]:
    """Of a stage for each speed, of which the first steps are slow and one of the others is an outlier."""
    steps = [(1.0, 1.0, speed, 10 * speed, speed)[number] for speed in speeds for number in range(STEPS)]
    return [{"step": n, "tokens_per_second": speed, "memory": n} for n, speed in enumerate(steps, start=1)]


def test_the_first_steps_and_outliers_do_not_count() -> None:
    """Catches the time of compiling and allocating being measured, and a size whose steps are not complete."""
    found = measured_speeds(events(100, 200, 400)[:-1], [3, 4, 5], stages=1)
    assert found == {3: Speed(100, STEPS), 4: Speed(200, 2 * STEPS)}
    assert measured_speeds([], [3], stages=1) == {}


def test_the_speed_over_stages_is_a_mean() -> None:
    """Catches a size that is fast in one stage being taken for fast."""
    found = measured_speeds(events(100, 300, 50), [0, 1], stages=2)
    assert found == {0: Speed(pytest.approx(150), 2 * STEPS)}


Rank = Callable[[RunFolder, StopSignals], LaunchResult]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrialRunner]:
    """A runner of trials whose ranks a function stands for."""

    def make(rank: Rank, seconds: float = 600.0) -> TrialRunner:
        def run_attempt(launch: Launch, layout: Layout, stop: StopSignals, record: AttemptRecord) -> LaunchResult:
            assert launch.quiet
            return rank(launch.folder, stop)

        monkeypatch.setattr(autotune_trial, "run_attempt", run_attempt)
        machine = Machine(Devices("cpu", (0,)), environ={}, find_port=lambda: 29501)
        plan = LaunchPlan(
            PretrainOptions(config="run.yaml"),
            config(tmp_path),
            RunFolder(tmp_path),
            {"localhost": (0,)},
            machine,
            {},
            cast(Any, SimpleNamespace(host_environment={})),
        )
        return TrialRunner(plan, time.monotonic() + seconds, is_enough)

    return make


def trains(*speeds: float, then: LaunchResult | None = None) -> Rank:
    """A rank that trains one size for each speed, then fails or runs until it is killed."""

    def rank(folder: RunFolder, stop: StopSignals) -> LaunchResult:
        folder.metrics.write_text("".join(json.dumps(event) + "\n" for event in events(*speeds)))
        if then is not None:
            write_outcome(folder, then.outcome, then.message, then.cause)
        if then is None or then.cause is Cause.OUT_OF_MEMORY:  # the other ranks wait for the one that failed
            wait_until(lambda: stop.killed)
        return then or LaunchResult(Outcome.STOPPED, "killed")

    return rank


@pytest.mark.parametrize(
    ("speeds", "measured"),
    [((100, 200, 300), [0, 1, 2]), ((100, 90), [0, 1]), ((100, 101, 300), [0, 1, 2])],
)
def test_a_trial_ends_when_enough_is_measured(
    runner: Callable[..., TrialRunner], speeds: tuple[float, ...], measured: list[int]
) -> None:
    """Catches ranks that train on after the last size, or with larger ones that are no faster."""
    result = runner(trains(*speeds)).run(range(3))
    assert (list(result.speeds), result.failure) == (measured, None)


def test_a_trial_ends_when_time_is_up(runner: Callable[..., TrialRunner]) -> None:
    """Catches a command that trains for longer than two minutes before the run starts."""

    def rank(folder: RunFolder, stop: StopSignals) -> LaunchResult:
        trials._deadline = time.monotonic()
        return trains(100)(folder, stop)

    trials = runner(rank)
    result = trials.run(range(3))
    assert (list(result.speeds), result.failure) == ([0], None)


def test_ranks_are_not_started_without_time(runner: Callable[..., TrialRunner]) -> None:
    result = runner(lambda *_: pytest.fail("started"), seconds=-1).run(range(3))
    assert (result.speeds, result.failure) == ({}, None)


def test_a_rank_out_of_memory_ends_the_trial(runner: Callable[..., TrialRunner]) -> None:
    """Catches waiting for ranks that wait for the one that has ended, and measured sizes that are forgotten."""
    result = runner(trains(100, then=FULL)).run(range(3))
    assert (list(result.speeds), result.failure) == ([0], FULL)


def test_a_failure_is_returned(runner: Callable[..., TrialRunner]) -> None:
    failure = LaunchResult(Outcome.FAILED, "it broke")
    result = runner(trains(then=failure)).run(range(3))
    assert (result.speeds, result.failure) == ({}, failure)


def test_an_interrupted_trial_kills_its_ranks(runner: Callable[..., TrialRunner]) -> None:
    """Catches ranks that outlive the command, and a trial that starts after a signal."""
    started = []

    def rank(folder: RunFolder, stop: StopSignals) -> LaunchResult:
        started.append(folder)
        trials.interrupt()
        assert stop.killed
        return LaunchResult(Outcome.STOPPED, "killed")

    trials = runner(rank)
    for _ in range(2):
        result = trials.run(range(3))
        assert (result.speeds, result.failure) == ({}, None)
    assert len(started) == 1
