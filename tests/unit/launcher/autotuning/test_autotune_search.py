import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from experiment.errors import StoppedError, UserError
from experiment.outcome_file import Cause, Outcome
from experiment.run_folder import RunFolder
from experiment.run_lock import is_locked
from launcher.autotuning import autotune as autotune_module
from launcher.autotuning.autotune import autotune, fastest, find_fastest, is_enough
from launcher.autotuning.autotune_trial import Speed, TrialResult, TrialRunner
from launcher.hosts.machine import Devices, Machine
from launcher.launch_plan import LaunchPlan
from launcher.options import PretrainOptions
from launcher.preflight.target import target_of_hosts
from launcher.supervision.attempt import Layout
from launcher.supervision.launch_result import LaunchResult
from pretrain.config import PretrainConfig

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
    with pytest.raises(autotune_module.TrialsFailedError, match=rf"{failure.message}\n.* one sequence does not fit"):
        find_fastest(Trials(RISING, -9, failure).run, range(-1, 1))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (BUG, autotune_module.TrialsFailedError, "it broke"),
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
    return LaunchPlan(options, config, folder, slots, machine, {}, target_of_hosts(slots, machine))


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


def test_an_unchanged_config_is_passed_as_the_user_wrote_it(plan: LaunchPlan, stand_in: Any) -> None:
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
