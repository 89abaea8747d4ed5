"""A trial of `--autotune`: one launch of all ranks that trains a few steps with each of several microbatch sizes.

Sizes are the stages of a schedule, in ascending order, so that all of them take one start of the ranks. A trial is
killed when it has measured enough: it saves no checkpoint.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import harmonic_mean, median

from experiment.outcome_file import Cause, read_outcome, reserve_outcome
from experiment.run_folder import RunFolder, open_run_folder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.jsonl import Event, read_events
from launcher.launch_plan import LaunchPlan, scaled_microbatch
from launcher.supervision.attempt import Layout, run_attempt
from launcher.supervision.launch_result import LaunchResult, begin_attempt
from launcher.supervision.rank_processes import polled
from launcher.supervision.stop_signals import StopSignals
from pretrain.config import CorpusConfig, PretrainConfig, ScheduleConfig, StageConfig

WARMUP_STEPS = 2
MEASURED_STEPS = 3
_STEPS = WARMUP_STEPS + MEASURED_STEPS  # with each size, in each stage of the run
_MORE_STEPS = 10_000  # at the end, which no trial reaches
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Speed:
    """What was measured with one size."""

    tokens_per_second: float  # over all ranks
    memory: int  # peak of rank 0 so far, in bytes


@dataclass(frozen=True)
class TrialResult:
    """The sizes that were measured, as doublings of the configured microbatch, and what ended the ranks before all
    were; None: the trial itself."""

    speeds: Mapping[int, Speed]
    failure: LaunchResult | None = None


def trial_config(config: PretrainConfig, sizes: Sequence[int], folder: RunFolder) -> PretrainConfig:
    """The config of a trial: the run with every part trained and its largest batches, but without evaluation,
    checkpoints, trackers and profile.

    Args:
        config: of the run, resolved.
        sizes: as doublings of its microbatch.
        folder: of the trial.
    """
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
            "corpus": CorpusConfig(train=config.corpus.train),
            "masking": config.masking.model_copy(update=masking),
            # The learning rate stays near 0, so that nothing diverges.
            "schedule": ScheduleConfig(warmup_steps=_MORE_STEPS * len(stages), stages=tuple(stages)),
            "evaluation": config.evaluation.model_copy(update={"best_metric": None, "patience": None}),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": None, "every_minutes": None}),
            "health": config.health.model_copy(update={"policy": "stop", "compare_every": None}),
            "tracking": TrackingConfig(),
        }
    )


def measured_speeds(events: Sequence[Event], sizes: Sequence[int], stages: int) -> dict[int, Speed]:
    """The speed with each size whose steps are complete. `events`: of metrics.jsonl; `stages`: of the run."""
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

    def __init__(self, plan: LaunchPlan, deadline: float, is_enough: Callable[[Sequence[Speed]], bool]) -> None:
        """Args:
        deadline: `time.monotonic()` when trials end.
        is_enough: whether the measured sizes of a trial, in ascending order, make the larger ones unnecessary.
        """
        self._plan = plan
        self._deadline = deadline
        self._is_enough = is_enough
        self._stop: StopSignals | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        """End the trial that is running, and start no other one."""
        self.interrupted = True
        if self._stop is not None:
            self._stop.kill_ranks()

    def run(self, sizes: Sequence[int]) -> TrialResult:
        """Train with these sizes, in ascending order. No process remains."""
        config, stages = self._plan.config, len(self._plan.config.stages)
        tokens = scaled_microbatch(config, sizes[0]).batch.microbatch_tokens
        folder = open_run_folder(self._plan.folder.trials / str(tokens))
        plan = replace(self._plan, config=trial_config(config, sizes, folder), folder=folder, config_changed=True)
        reserve_outcome(folder)
        record = begin_attempt(folder, plan.slots, time.time())
        self._stop = stop = StopSignals(folder)
        if self.interrupted or self._time_is_up():
            return TrialResult({})
        with self._watched(folder, sizes, stages) as ended:
            result = run_attempt(replace(plan.launch(), quiet=True), Layout(plan.slots), stop, record)
        return TrialResult(_read_speeds(folder, sizes, stages), None if ended.is_set() or self.interrupted else result)

    @contextmanager
    def _watched(self, folder: RunFolder, sizes: Sequence[int], stages: int) -> Iterator[threading.Event]:
        """Kill the ranks when they have measured enough or time is up, which sets the event, or memory has run out:
        ranks may wait long for one that has ended."""
        ended = threading.Event()

        def is_settled() -> bool:
            speeds = _read_speeds(folder, sizes, stages)
            if len(speeds) == len(sizes) or self._is_enough(list(speeds.values())) or self._time_is_up():
                ended.set()
            elif not _out_of_memory(folder):
                return False
            assert self._stop is not None
            self._stop.kill_ranks()
            return True

        with polled(is_settled, _POLL_SECONDS, "autotune"):
            yield ended

    def _time_is_up(self) -> bool:
        return time.monotonic() > self._deadline


def remove_trials(folder: RunFolder) -> None:
    shutil.rmtree(folder.trials, ignore_errors=True)


def _read_speeds(folder: RunFolder, sizes: Sequence[int], stages: int) -> dict[int, Speed]:
    with suppress(OSError):  # a network disk does not answer for a moment
        return measured_speeds(read_events(folder.metrics), sizes, stages)
    return {}


def _out_of_memory(folder: RunFolder) -> bool:
    reported = read_outcome(folder)
    return reported is not None and reported.cause is Cause.OUT_OF_MEMORY
