"""Report on a run: metrics at each log event, alerts, and which rank is slow."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from experiment.process.daemon_thread import in_daemon_thread
from experiment.process.hardware import peak_flops, peak_memory
from experiment.run_files.downstream import DownstreamLog
from experiment.run_files.goodput import ActivityTimer
from experiment.run_files.metrics_file import SLOW_RATIO, Metrics
from experiment.run_files.outcome_file import Outcome
from experiment.tracking.alerts import Alert
from experiment.tracking.tracker import CLOSE_SECONDS, Trackers
from pretrain.engine.engine import Engine
from pretrain.engine.host_copy import read_numbers
from pretrain.modeling.structure import FlopsModel
from pretrain.resolve import ResolvedRun
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.log_interval import LogInterval
from pretrain.training_progress import TrainingProgress

log = logging.getLogger(__name__)

_HOUR = 3600.0
_SLOW_INTERVALS = 5  # in a row


@dataclass
class Reporter:
    """Logs the metrics of a run every `run.log_every` steps and after its last one, and sends alerts."""

    run: ResolvedRun
    flops: FlopsModel | None  # of the model; None if they are unknown
    engine: Engine
    interval: LogInterval
    times: ActivityTimer
    nodes: Sequence[str]  # the host of each rank
    tracker: Trackers | None  # of rank 0; None on the others

    def __post_init__(self) -> None:
        self._slow_ranks = SlowRanks(self.nodes)
        self._downstream = DownstreamLog(self.run.folder)
        self._checkpoint_alarm = CheckpointAlarm(self.run.config.tracking.alerts.no_checkpoint_hours)
        self._logged_step = -1

    def is_due(self, progress: TrainingProgress, finished: bool) -> bool:
        return finished or progress.is_multiple_of(self.run.config.run.log_every)

    def report(
        self, progress: TrainingProgress, rate: float, grad_norm: float, saved_step: int | None
    ) -> TrainingProgress:
        """Log the interval, and return the progress with its losses. Starts the next interval. Collective.

        Args:
            rate: the learning rate of the last step.
            grad_norm: of the last step, before clipping.
            saved_step: of the newest checkpoint.
        """
        interval, by_corpus = self.interval, progress.tokens_by_corpus
        loss = interval.mean_loss()  # waits for the device, which is part of the pace
        pace = interval.measure_pace()
        slowest_rank = self._slowest_rank(pace.data_seconds)
        metrics: Metrics = {
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "loss_scale": self.engine.loss_scale,
            "skipped_steps": progress.skipped_steps,
            "overflows": progress.overflows if self.engine.precision == "fp16" else None,
            "tokens_per_second": pace.tokens_per_second,
            "mfu": self._mfu(pace.seconds),
            "data_wait": pace.data_seconds / pace.seconds,
            "goodput": self.times.goodput,
            "checkpoint_seconds": pace.checkpoint_seconds,
            "memory": peak_memory(),
            **slowest_rank,
            **({f"tokens/{name}": tokens for name, tokens in by_corpus.items()} if len(by_corpus) > 1 else {}),
        }
        self.log(progress, metrics)
        self._log_downstream(progress.step)
        if (message := self._checkpoint_alarm.check(saved_step)) is not None:
            self.alert(Alert("no_checkpoint", message))
        self.times.record()
        return interval.end(progress)

    def log(self, progress: TrainingProgress, metrics: Metrics) -> None:
        """Log an event of the current step, unless it was logged before a rewind."""
        if self.tracker is not None and progress.step > self._logged_step:
            self.tracker.log({"step": progress.step, "tokens": progress.tokens, **metrics})

    def skip_until(self, step: int) -> None:
        """Skip events up to this step, which are logged already, after a rewind."""
        self._logged_step = max(self._logged_step, step)

    def alert(self, alert: Alert) -> None:
        if self.tracker is not None:
            self.tracker.alert(alert)

    def close(self, outcome: Outcome, step: int, group: CpuGroup) -> None:
        """Close the trackers, which may wait for servers until their timeouts. `step`: the last finished one.
        Collective unless the run has failed.

        Raises TimeoutError if they wait far longer, as for a disk that does not answer; not if the run has failed.
        """
        closing = in_daemon_thread(lambda: self._close_tracker(outcome, step), "trackers")
        if outcome is Outcome.FAILED:
            wait([closing], CLOSE_SECONDS)
        else:
            deadline = time.monotonic() + CLOSE_SECONDS
            group.wait_for_all(closing, lambda: time.monotonic() < deadline)
            closing.result()

    def _close_tracker(self, outcome: Outcome, step: int) -> None:
        if self.tracker is not None:
            self.tracker.close(outcome, step)

    def _slowest_rank(self, data_seconds: float) -> Metrics:
        """Compare how long the ranks have worked in the interval without waiting for others. Collective.

        data_seconds: that this rank has waited for data.
        """
        timer, world = self.engine.forward_timer, self.engine.world
        if not timer.enabled:
            return {}
        forward_seconds = timer.take()
        seconds = torch.zeros(world.size, dtype=torch.float64, device=self.engine.device)
        seconds[world.rank].fill_(forward_seconds + data_seconds if forward_seconds else 0.0)  # `=` waits for a GPU
        dist.all_reduce(seconds)
        slowest = self._slow_ranks.update(read_numbers(seconds)) if self.tracker is not None else None
        if slowest is None:
            return {"slowest_rank": None, "slowest_rank_ratio": None}
        return {"slowest_rank": slowest.rank, "slowest_rank_ratio": slowest.ratio}

    def _mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of the interval; None where the device's peak or the model's FLOPs are unknown."""
        if self.engine.device.type != "cuda" or self.flops is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.engine.device), self.engine.precision)
        if peak is None:
            return None
        return self.interval.flops(self.flops) / seconds / (peak * self.engine.world.size)

    def _log_downstream(self, step: int) -> None:
        """Log new scores of `deepcloze watch`, which are events of earlier steps."""
        if self.tracker is not None:
            for event in self._downstream.take_new(step):
                self.tracker.log(event)


class SlowestRank(NamedTuple):
    rank: int
    ratio: float  # of its time to the median of all ranks


class SlowRanks:
    """Compares the ranks in each log interval, and warns of one that stays slow."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """`nodes`: the host of each rank."""
        self._nodes = nodes
        self._slow: int | None = None  # rank
        self._intervals = 0  # in which it was the slowest one, and slow

    def update(self, times: Sequence[float]) -> SlowestRank | None:
        """Return the slowest rank of an interval; None if unknown. Warns once of a rank that was slow in several in a
        row.

        times: that each rank took for work in which it waits for no other rank, in any unit; 0: unknown.
        """
        if min(times) == 0:
            return None
        median = statistics.median_low(times)
        rank = max(range(len(times)), key=times.__getitem__)
        slowest = SlowestRank(rank, times[rank] / median)
        if slowest.ratio < SLOW_RATIO or rank != self._slow:
            self._slow, self._intervals = rank, 0
        if slowest.ratio >= SLOW_RATIO:
            self._intervals += 1
            if self._intervals == _SLOW_INTERVALS:
                log.warning(
                    f"{self._nodes[rank]}, rank {rank} is slow: its forward passes and waits for data took "
                    f"{slowest.ratio:.1f} times the median of all ranks, and at least {SLOW_RATIO:.1f} times in each "
                    f"of the last {_SLOW_INTERVALS} log intervals"
                )
        return slowest


class CheckpointAlarm:
    """An alarm after `hours` without a new checkpoint, and again after as many."""

    def __init__(self, hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = hours * _HOUR
        self._saved_step: int | None = None
        self._saved_at = clock()
        self._due = self._saved_at + self._seconds

    def check(self, saved_step: int | None) -> str | None:
        """Return the message to send now, if any. `saved_step`: of the newest checkpoint."""
        now = self._clock()
        if saved_step != self._saved_step:
            self._saved_step, self._saved_at = saved_step, now
            self._due = now + self._seconds
        if now < self._due:
            return None
        self._due = now + self._seconds
        newest = "there is none" if saved_step is None else f"the newest is of step {saved_step}"
        return f"no checkpoint was saved for {(now - self._saved_at) / _HOUR:.1f} hours; {newest}"
