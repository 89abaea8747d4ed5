"""`deepcloze pretrain --autotune`: find the fastest microbatch that fits in memory, before a launch.

A trial is one launch of all ranks that trains a few steps with each of several microbatch sizes, in ascending order, as
the stages of a schedule, so that all of them take one start of the ranks. It is killed when it has measured enough, and
saves no checkpoint. The first trial has the configured microbatch, and larger ones as long as they get faster. If the
configured one does not fit, further trials have smaller ones. The global batch stays the same.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from statistics import harmonic_mean, median

from experiment.errors import StoppedError, UserError, inform
from experiment.formatting import UNKNOWN
from experiment.process.signals import handle_stop_signals
from experiment.run_files.metrics_file import Event, read_events
from experiment.run_files.outcome_file import Cause, Outcome, read_outcome, read_rank_records
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import Renewal, lock_run
from experiment.tracking.config import TrackingConfig
from launcher.launch_plan import LaunchPlan
from launcher.ranks.microbatch import max_doublings, max_halvings, scaled_microbatch
from launcher.supervision.attempt import Layout, run_attempt
from launcher.supervision.launch_result import LaunchResult, begin_attempt
from launcher.supervision.rank_processes import polled
from launcher.supervision.stop_signals import StopSignals
from pretrain.config import PretrainConfig
from pretrain.schedule_config import ScheduleConfig, StageConfig

LIMIT_SECONDS = 120.0
"""Time limit of all trials together, including the start of their ranks."""

WARMUP_STEPS = 2
MEASURED_STEPS = 3
_STEPS = WARMUP_STEPS + MEASURED_STEPS  # with each size, in each stage of the run
_MORE_STEPS = 10_000  # at the end, which no trial reaches
_POLL_SECONDS = 0.1
_LEAST_GAIN = 1.02  # a size is faster than another one if it is by this factor: less may be chance
_MEMORY_CAUSES = (Cause.OUT_OF_MEMORY, Cause.KILLED)  # the system kills ranks that use up the memory of a host


@dataclass(frozen=True)
class Speed:
    """The measurements of one size."""

    tokens_per_second: float  # over all ranks
    memory: int  # peak of rank 0 so far, in bytes


@dataclass(frozen=True)
class TrialResult:
    """The sizes that were measured, as doublings of the configured microbatch, and the result that ended the
    ranks before all were; None: the trial ended them."""

    speeds: Mapping[int, Speed]
    failure: LaunchResult | None = None


@dataclass(frozen=True)
class Findings:
    """The findings of the trials. Sizes are doublings of the configured microbatch."""

    choice: int
    speeds: Mapping[int, Speed] = field(default_factory=dict)
    failures: Mapping[int, LaunchResult] = field(default_factory=dict)


class TrialsFailedError(Exception):
    """The run would fail as the trial did."""


def autotune(plan: LaunchPlan, dead_owner: Renewal | None = None) -> LaunchPlan:
    """Return the plan with the microbatch that trials found to be the fastest. Prints a table of the trials.

    `dead_owner`: as `check_unlocked` returns it.

    Raises StoppedError for a signal, and UserError or SystemExit if the ranks rejected the run, or failed with every
    size.
    """
    folder = open_run_folder(plan.folder.path)
    ranks = sum(map(len, plan.slots.values()))
    runner = TrialRunner(plan, time.monotonic() + LIMIT_SECONDS)
    with handle_stop_signals(lambda _: runner.interrupt()), lock_run(folder, runner.interrupt, dead_owner):
        shutil.rmtree(folder.trials, ignore_errors=True)  # of a command that was killed
        inform(f"autotune: trying microbatch sizes for at most {LIMIT_SECONDS:.0f} s")
        try:
            sizes = range(-max_halvings(plan.config), max_doublings(plan.config, ranks) + 1)
            findings = find_fastest(runner.run, sizes)
        except TrialsFailedError as error:
            sys.exit(f"deepcloze: the run failed during --autotune: {error}\nlogs: {folder.trials}")
        except BaseException:
            shutil.rmtree(folder.trials, ignore_errors=True)
            raise
        shutil.rmtree(folder.trials, ignore_errors=True)
    if runner.interrupted:
        raise StoppedError("stopped during --autotune, before the first step; run the same command again")
    _print_table(plan, findings)
    return replace(plan, config=scaled_microbatch(plan.config, findings.choice)) if findings.choice else plan


def find_fastest(run_trial: Callable[[Sequence[int]], TrialResult], sizes: range) -> Findings:
    """Find the fastest of the sizes, which include 0.

    Raises UserError if the ranks rejected the run, TrialsFailedError if they failed for another reason than memory, or
    with all sizes.
    """
    failures: dict[int, LaunchResult] = {}
    tried = range(sizes.stop)
    while True:
        result = run_trial(tried)
        failure = result.failure
        if failure is not None and len(result.speeds) < len(tried):
            failures[tried[len(result.speeds)]] = failure
        if result.speeds or failure is None or failure.cause is Cause.LOST_HOST:
            # Nothing measured: there was no time, or a host is lost, which the launch that follows can do without.
            return Findings(fastest(result.speeds) if result.speeds else tried[0], result.speeds, failures)
        if failure.outcome is Outcome.REFUSED:
            raise UserError(failure.message)
        if failure.outcome is Outcome.STOPPED:
            raise StoppedError(failure.message)
        if failure.cause not in _MEMORY_CAUSES:
            raise TrialsFailedError(failure.message)
        if tried[0] == sizes[0]:
            raise TrialsFailedError(
                f"{failure.message}\na microbatch of one sequence does not fit; see docs/precision.md for what else "
                "saves memory"
            )
        tried = range(max(sizes[0], tried[0] - 2), tried[0])


def fastest(speeds: Mapping[int, Speed]) -> int:
    """Return the smallest size that no larger one beats clearly."""
    choice, *larger = sorted(speeds)
    for size in larger:
        if _is_faster(speeds[size], speeds[choice]):
            choice = size
    return choice


def is_enough(speeds: Sequence[Speed]) -> bool:
    """Return whether the last size is no faster than the one before: larger ones will not be either."""
    return len(speeds) > 1 and not _is_faster(speeds[-1], speeds[-2])


def _is_faster(one: Speed, other: Speed) -> bool:
    return one.tokens_per_second > _LEAST_GAIN * other.tokens_per_second


def _print_table(plan: LaunchPlan, findings: Findings) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("microbatch_tokens", "tokens/s", "memory", ""):
        table.add_column(name, justify="right" if name else "left")
    for size in sorted({*findings.speeds, *findings.failures, findings.choice}):
        table.add_row(f"{scaled_microbatch(plan.config, size).batch.microbatch_tokens:,}", *_cells(findings, size))
    with suppress(OSError):  # the terminal may be closed
        Console(stderr=True, highlight=False, markup=False, emoji=False).print(table)


def _cells(findings: Findings, size: int) -> tuple[str, str, str]:
    """Return tokens per second, memory and a remark."""
    chosen = "chosen" if size == findings.choice else ""
    if (speed := findings.speeds.get(size)) is not None:
        return f"{speed.tokens_per_second:,.0f}", f"{speed.memory / 2**30:.1f} GiB", chosen
    if (failure := findings.failures.get(size)) is not None:
        reason = "out of memory" if failure.cause in _MEMORY_CAUSES else failure.message.partition("\n")[0]
        return UNKNOWN, UNKNOWN, reason
    return UNKNOWN, UNKNOWN, f"{chosen}: not measured in time"


def trial_config(config: PretrainConfig, sizes: Sequence[int], folder: RunFolder) -> PretrainConfig:
    """Return the config of a trial: the run with every part trained and its largest batches, but without evaluation,
    checkpoints, trackers and profile. config: of the run, resolved. sizes: as doublings of its microbatch."""
    stages = [
        StageConfig(
            steps=_STEPS,
            max_seq_length=stage.max_seq_length,
            sequences=stage.sequences,
            microbatch_tokens=stage.microbatch_tokens,
        )
        for size in sizes
        for stage in scaled_microbatch(config, size).stages
    ]
    stages[-1] = stages[-1].model_copy(update={"steps": _STEPS + _MORE_STEPS})
    masking = {"schedule": "constant", "rate": max(config.masking.rates)}
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"dir": str(folder.path), "log_every": 1, "resume": "auto", "profile": False}
            ),
            "model": config.model.model_copy(update={"freeze": (), "freeze_steps": 0}),
            "corpus": config.corpus.model_copy(update={"eval": {}}),
            "masking": config.masking.model_copy(update=masking),
            # The learning rate stays near 0, so that nothing diverges.
            "schedule": ScheduleConfig(warmup_steps=_MORE_STEPS * len(stages), stages=tuple(stages)),
            "evaluation": config.evaluation.model_copy(update={"best_metric": None, "patience": None}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every_steps": None, "every_minutes": None, "mirror": None}
            ),
            "health": config.health.model_copy(update={"policy": "stop", "compare_every": None}),
            "tracking": TrackingConfig(),
        }
    )


def measured_speeds(events: Sequence[Event], sizes: Sequence[int], stages: int) -> dict[int, Speed]:
    """Return the speed with each size whose steps are complete. `events`: of metrics.jsonl; `stages`: of the run."""
    by_step = {event["step"]: event for event in events}
    speeds = {}
    for number, size in enumerate(sizes):
        first = number * stages * _STEPS + 1
        if first + stages * _STEPS - 1 not in by_step:
            break
        medians = [
            median(by_step[step]["tokens_per_second"] for step in range(start + WARMUP_STEPS, start + _STEPS))
            for start in range(first, first + stages * _STEPS, _STEPS)
        ]
        speeds[size] = Speed(harmonic_mean(medians), by_step[first + stages * _STEPS - 1]["memory"])
    return speeds


class TrialRunner:
    """Runs trials of a launch, one after the other."""

    def __init__(self, plan: LaunchPlan, deadline: float) -> None:
        """`deadline`: `time.monotonic()` when trials end."""
        self._plan = plan
        self._deadline = deadline
        self._stop: StopSignals | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        """End the trial that is running, and start no other one."""
        self.interrupted = True
        if self._stop is not None:
            self._stop.kill_ranks()

    def run(self, sizes: Sequence[int]) -> TrialResult:
        """Train with these sizes, in ascending order. No process remains. Raises TrialsFailedError if a rank was killed
        before any of them trained."""
        config, stages = self._plan.config, len(self._plan.config.stages)
        tokens = scaled_microbatch(config, sizes[0]).batch.microbatch_tokens
        folder = open_run_folder(self._plan.folder.trials / str(tokens))
        if self._plan.saved_model is not None:  # the files of `model.init_from` may be gone
            config = config.model_copy(update={"model": self._plan.saved_model})
        plan = replace(self._plan, config=trial_config(config, sizes, folder), folder=folder)
        record = begin_attempt(folder, plan.slots, time.time())
        self._stop = stop = StopSignals(folder)
        if self.interrupted or self._time_is_up():
            return TrialResult({})
        with self._watched(folder, sizes, stages) as ended:
            result = run_attempt(replace(plan.settings(), quiet=True), Layout(plan.slots), stop, record)
        speeds = _read_speeds(folder, sizes, stages)
        if ended.is_set() or self.interrupted:
            return TrialResult(speeds)
        trained = bool(speeds) or any(rank.training for rank in read_rank_records(folder))
        if result.cause is Cause.KILLED and not trained:
            raise TrialsFailedError(result.message)  # not for lack of memory
        return TrialResult(speeds, result)

    @contextmanager
    def _watched(self, folder: RunFolder, sizes: Sequence[int], stages: int) -> Iterator[threading.Event]:
        """Kill the ranks when they have measured enough or time is up, which sets the event, or memory has run out:
        ranks may wait long for one that has ended."""
        ended = threading.Event()

        def is_settled() -> bool:
            speeds = _read_speeds(folder, sizes, stages)
            if len(speeds) == len(sizes) or is_enough(list(speeds.values())) or self._time_is_up():
                ended.set()
            elif (reported := read_outcome(folder)) is None or reported.cause is not Cause.OUT_OF_MEMORY:
                return False
            assert self._stop is not None
            self._stop.kill_ranks()
            return True

        with polled(is_settled, _POLL_SECONDS, "autotune"):
            yield ended

    def _time_is_up(self) -> bool:
        return time.monotonic() > self._deadline


def _read_speeds(folder: RunFolder, sizes: Sequence[int], stages: int) -> dict[int, Speed]:
    with suppress(OSError):  # a network disk does not answer for a moment
        return measured_speeds(read_events(folder.metrics), sizes, stages)
    return {}
