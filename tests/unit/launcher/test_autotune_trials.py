"""The search for the fastest microbatch with stand-ins for trials, and trials with stand-ins for ranks."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from experiment.config import build_config, dump_config
from experiment.errors import StoppedError, UserError
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, write_outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import is_locked
from launcher import autotune as autotune_module
from launcher.autotune import (
    MEASURED_STEPS,
    WARMUP_STEPS,
    Speed,
    TrialResult,
    TrialRunner,
    TrialsFailedError,
    autotune,
    fastest,
    find_fastest,
    is_enough,
    measured_speeds,
    trial_config,
)
from launcher.hosts.machine import Devices, Machine
from launcher.launch_plan import LaunchPlan
from launcher.options import PretrainOptions
from launcher.preflight.target import target_of_hosts
from launcher.supervision.attempt import LaunchSettings, Layout
from launcher.supervision.launch_result import AttemptRecord, LaunchResult
from launcher.supervision.stop_signals import StopSignals
from pretrain.config import PretrainConfig
from waiting import wait_until

STEPS = WARMUP_STEPS + MEASURED_STEPS
FULL = LaunchResult(Outcome.FAILED, "OutOfMemoryError", Cause.OUT_OF_MEMORY)
KILLED = LaunchResult(Outcome.FAILED, "a rank was killed", Cause.KILLED)
BUG = LaunchResult(Outcome.FAILED, "it broke", Cause.ERROR)


class Trials:
    """Stands for trials on a machine where sizes up to `fits` fit, until the time for `seconds` sizes is over."""

    def __init__(self, speeds: dict[int, float], fits: int, failure: LaunchResult = FULL, seconds: int = 100) -> None:
        self._speeds = speeds
        self._fits = fits
        self._failure = failure
        self._seconds = seconds
        self.tried: list[list[int]] = []

    def run(self, sizes: Sequence[int]) -> TrialResult:
        self.tried.append(list(sizes))
        found: dict[int, Speed] = {}
        for size in sizes:
            if self._seconds == 0:
                return TrialResult(found)
            if size > self._fits:
                return TrialResult(found, self._failure)
            found[size] = Speed(self._speeds[size], 1)
            self._seconds -= 1
            if is_enough(list(found.values())):
                break
        return TrialResult(found)


RISING = {size: 100.0 + 10 * size for size in range(-9, 9)}


@pytest.mark.parametrize(
    ("speeds", "fits", "seconds", "choice", "tried"),
    [
        (RISING, 9, 100, 3, [[0, 1, 2, 3]]),
        (RISING, 1, 100, 1, [[0, 1, 2, 3]]),
        (RISING, 9, 2, 1, [[0, 1, 2, 3]]),  # time is up
        (RISING, 9, 0, 0, [[0, 1, 2, 3]]),  # with nothing measured
        (RISING, -1, 100, -1, [[0, 1, 2, 3], [-2, -1]]),
        (RISING, -2, 100, -2, [[0, 1, 2, 3], [-2, -1]]),
        (RISING, -4, 100, -4, [[0, 1, 2, 3], [-2, -1], [-4, -3]]),
        (RISING, -5, 100, -5, [[0, 1, 2, 3], [-2, -1], [-4, -3], [-5]]),
        (RISING, -1, 0, 0, [[0, 1, 2, 3]]),
        ({0: 100.0, 1: 90.0, 2: 200.0, 3: 300.0}, 9, 100, 0, [[0, 1, 2, 3]]),  # slower: the trial ends
        ({0: 100.0, 1: 101.0, 2: 200.0, 3: 300.0}, 9, 100, 0, [[0, 1, 2, 3]]),  # a tie: needs less memory
        (RISING | {-2: 200.0}, -1, 100, -2, [[0, 1, 2, 3], [-2, -1]]),
    ],
)
def test_the_fastest_size_that_fits_is_found(
    speeds: dict[int, float], fits: int, seconds: int, choice: int, tried: list[list[int]]
) -> None:
    """Catches a size that does not fit or is slower, one that is tried in vain, and a fitting one that is missed."""
    trials = Trials(speeds, fits, seconds=seconds)
    assert find_fastest(trials.run, range(-5, 4)).choice == choice
    assert trials.tried == tried


def test_sizes_are_compared_with_the_fastest_one() -> None:
    """Catches a size that wins by small gains over its neighbours, each of which counts as none."""
    assert fastest({0: Speed(100, 1), 1: Speed(101.5, 1), 2: Speed(103, 1)}) == 2


@pytest.mark.parametrize("failure", [FULL, KILLED])
def test_if_nothing_fits_the_command_fails(failure: LaunchResult) -> None:
    with pytest.raises(TrialsFailedError, match=rf"{failure.message}\n.* one sequence does not fit"):
        find_fastest(Trials(RISING, -9, failure).run, range(-1, 1))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (BUG, TrialsFailedError, "it broke"),
        (LaunchResult(Outcome.REFUSED, "model.init_from: none"), UserError, "init_from"),
        (LaunchResult(Outcome.STOPPED, "SIGTERM", Cause.SIGNAL), StoppedError, "SIGTERM"),
    ],
)
def test_another_failure_ends_the_command(failure: LaunchResult, error: type[Exception], message: str) -> None:
    """Catches a bug that is taken for a lack of memory, and trials that hide it."""
    trials = Trials(RISING, -9, failure)
    with pytest.raises(error, match=message):
        find_fastest(trials.run, range(-1, 2))
    assert trials.tried == [[0, 1]]


def test_a_lost_host_ends_the_search_but_not_the_command() -> None:
    """Catches a launch that fails because of a host that it would have left out."""
    lost = LaunchResult(Outcome.FAILED, "lost node-2: no answer", Cause.LOST_HOST, frozenset({"node-2"}))
    findings = find_fastest(Trials(RISING, -9, lost).run, range(-1, 2))
    assert (findings.choice, dict(findings.failures)) == (0, {0: lost})


def test_a_failure_with_a_larger_size_only_ends_the_search() -> None:
    """Catches a run that would work, but does not start because an experiment with its size failed."""
    findings = find_fastest(Trials(RISING, 0, BUG).run, range(-1, 3))
    assert (findings.choice, dict(findings.failures)) == (0, {1: BUG})


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    """Of a run on one rank: a microbatch has 1 to 16 sequences."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "c"},
        "batch": {"sequences": 16, "max_seq_length": 100, "microbatch_tokens": 400},
        "schedule": {"steps": 10},
    }
    machine = Machine(Devices("cpu", (0,)), environ={}, find_port=lambda: 29501)
    options = PretrainOptions(config="run.yaml", overrides={"run.seed": "7"}, autotune=True)
    folder, slots = RunFolder(tmp_path / "run"), {"localhost": (0,)}
    config = build_config(PretrainConfig, tree)
    return LaunchPlan(options, config, folder, slots, machine, target_of_hosts(slots, machine, options))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., TrialResult]], None]:
    """Lets a function stand for `TrialRunner.run`."""
    return lambda run: monkeypatch.setattr(TrialRunner, "run", run)


def test_the_choice_reaches_the_ranks(plan: LaunchPlan, stand_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches ranks that get the file and the overrides of the user, which have another size."""
    tried: list[list[int]] = []

    def run(runner: TrialRunner, sizes: Sequence[int]) -> TrialResult:
        tried.append(list(sizes))
        assert is_locked(plan.folder), "another launch must not use the devices"
        plan.folder.trials.mkdir()
        return TrialResult({0: Speed(12345, 2**31), 1: Speed(23456, 2**31)}, FULL)

    stand_in(run)
    tuned = autotune(plan)
    assert tried == [[0, 1, 2]]
    assert tuned.config.batch.microbatch_tokens == 800
    assert tuned.config.batch.sequences == 16
    command = tuned.command(Layout(tuned.slots))
    assert command.argv[-1] == str(plan.folder.logs / "launch.yaml")
    assert "microbatch_tokens: 800" in command.files[plan.folder.logs / "launch.yaml"]
    assert not plan.folder.trials.exists()
    lines = capsys.readouterr().err.splitlines()
    assert ["12,345" in line for line in lines if "│" in line] == [True, False, False]
    assert any("800" in line and "23,456" in line and "2.0 GiB" in line and "chosen" in line for line in lines)
    assert any("1,600" in line and "out of memory" in line for line in lines)


def test_the_configured_size_may_be_the_choice(plan: LaunchPlan, stand_in: Any) -> None:
    stand_in(lambda runner, sizes: TrialResult({0: Speed(1, 1)}))
    assert autotune(plan) is plan


def test_a_signal_ends_the_command(plan: LaunchPlan, stand_in: Any) -> None:
    """Catches a run that starts after Ctrl-C, and files of a trial that stay."""

    def run(runner: TrialRunner, sizes: Sequence[int]) -> TrialResult:
        plan.folder.trials.mkdir()
        os.kill(os.getpid(), signal.SIGINT)
        return TrialResult({})

    stand_in(run)
    with pytest.raises(StoppedError, match="stopped during --autotune"):
        autotune(plan)
    assert not plan.folder.trials.exists()


def test_the_logs_of_a_failed_trial_stay(plan: LaunchPlan, stand_in: Any) -> None:
    def run(runner: TrialRunner, sizes: Sequence[int]) -> TrialResult:
        plan.folder.trials.mkdir()
        return TrialResult({}, BUG)

    stand_in(run)
    with pytest.raises(SystemExit, match=r"the run failed during --autotune: it broke\nlogs: .*autotune"):
        autotune(plan)
    assert plan.folder.trials.exists()


def config(folder: Path, **changes: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder), "resume": "checkpoints/other", "seed": 3, "profile": True},
        "model": {"config": {"model_type": "bert"}, "freeze": ["embeddings"], "freeze_steps": 9},
        "corpus": {"train": "c", "eval": {"held_out": "d"}},
        "batch": {"sequences": 16, "max_seq_length": 100, "microbatch_tokens": 400},
        "masking": {"rate": [0.3, 0.15], "schedule": "linear"},
        "schedule": {"name": "wsd", "steps": 100, "decay_steps": 50, "batch_warmup_steps": 50},
        "evaluation": {"best_metric": "eval/held_out/loss", "patience": 2},
        "checkpoint": {"every_steps": 1, "every_minutes": 1, "mirror": "s3://bucket/run"},
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
    assert (trial.checkpoint.every_steps, trial.checkpoint.every_minutes, trial.checkpoint.mirror) == (None, None, None)
    assert trial.health.policy == "stop"
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
        def run_attempt(
            launch: LaunchSettings, layout: Layout, stop: StopSignals, record: AttemptRecord
        ) -> LaunchResult:
            assert launch.quiet
            return rank(launch.folder, stop)

        monkeypatch.setattr(autotune_module, "run_attempt", run_attempt)
        machine = Machine(Devices("cpu", (0,)), environ={}, find_port=lambda: 29501)
        plan = LaunchPlan(
            PretrainOptions(config="run.yaml"),
            config(tmp_path),
            RunFolder(tmp_path),
            {"localhost": (0,)},
            machine,
            cast(Any, SimpleNamespace(host_environment={})),
        )
        return TrialRunner(plan, time.monotonic() + seconds)

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


@pytest.mark.parametrize("training", [False, True])
def test_a_kill_counts_as_a_lack_of_memory_if_ranks_have_trained(
    runner: Callable[..., TrialRunner], training: bool
) -> None:
    """Catches a run that trains with a smaller microbatch because a rank was killed during its imports."""

    def rank(folder: RunFolder, stop: StopSignals) -> LaunchResult:
        RankRecord(0, "node-0", 70, training).write(folder)
        return KILLED

    if training:
        assert runner(rank).run(range(3)).failure == KILLED
    else:
        with pytest.raises(TrialsFailedError, match=KILLED.message):
            runner(rank).run(range(3))


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
