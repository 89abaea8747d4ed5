"""The training loop: load, step, log, evaluate, save."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.folder import Outcome
from experiment.meters import Throughput, device_memory
from experiment.tracking import Tracker
from pretrain.batching.loader import RankBatch
from pretrain.config import PretrainConfig
from pretrain.modeling.flops import FlopsModel
from pretrain.training.agreement import Agreement
from pretrain.training.engine import Engine, StepResult
from pretrain.training.schedules import learning_rate
from pretrain.training.stopping import StopWish

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Saved with every checkpoint; the same on all ranks."""

    step: int = 0  # finished steps
    tokens: int = 0  # real tokens so far, special ones included
    tokens_by_corpus: dict[str, int] = field(default_factory=dict)  # of each corpus that was trained on
    seconds: float = 0.0  # spent training, over all attempts, by rank 0's clock
    interval_losses: tuple[float, ...] = ()  # summed loss of each step since the last log event
    interval_masked: int = 0  # predicted tokens in them
    skipped_steps: int = 0  # of them, those that updated nothing
    overflows: int = 0  # of those, because a gradient overflowed fp16
    evaluated: bool = False  # whether this step's evaluation, if one is due, is done


@dataclass(frozen=True)
class Parts:
    """What the loop drives, built elsewhere."""

    config: PretrainConfig
    engine: Engine
    agreement: Agreement
    batches: Iterator[RankBatch]  # from the first step that is not done
    steps: int | None  # in the whole run; None: schedule.budget ends it
    corpora: tuple[str, ...]  # names of those that are trained on
    evaluate: Callable[[], dict[str, float | int | None]]  # flat metrics
    save: Callable[[Progress], None]
    stop: StopWish
    tracker: Tracker | None  # on rank 0
    flops: FlopsModel
    peak_flops: float | None  # of one device


class _Totals(NamedTuple):
    """One step's numbers, over all ranks."""

    masked: int  # predicted tokens
    tokens: int  # real tokens, special ones included
    squared_lengths: int
    stop_wishes: int  # ranks that were asked to stop
    save_wishes: int  # 1: by rank 0's clock a checkpoint is due
    milliseconds: int  # spent training before this step, by rank 0's clock
    corpus_tokens: tuple[int, ...]  # real tokens by corpus


@dataclass
class _Interval:
    """The steps since the last log event.

    Each step's loss is reduced on its own and added up in the order of the steps, so that a run that was stopped in
    the middle of an interval logs the same figure as one that was not.
    """

    losses: list[float] = field(default_factory=list)  # of each step, summed over ranks and predicted tokens
    masked: int = 0
    pending: list[Tensor] = field(default_factory=list)  # this rank's part of the next losses, still on the device
    totals: list[_Totals] = field(default_factory=list)  # of the steps that this process timed

    def add(self, loss: Tensor, totals: _Totals) -> None:
        self.pending.append(loss)
        self.totals.append(totals)
        self.masked += totals.masked

    def reduce(self, device: torch.device) -> None:
        """Bring all losses to the host. Collective; the interval's only wait for the device."""
        if self.pending:
            summed = torch.stack([loss.to(device, torch.float64) for loss in self.pending])
            dist.all_reduce(summed)
            self.losses += summed.tolist()
            self.pending.clear()


def train(parts: Parts, progress: Progress) -> Outcome:
    """Train from `progress` to the last step, or until a rank is asked to stop; the last step reached is saved."""
    interval = _Interval(list(progress.interval_losses), progress.interval_masked)
    pace = Throughput()
    clock = _Clock(progress.seconds)
    if _evaluation_due(parts, progress) and not progress.evaluated:
        with pace.paused():
            progress = _evaluate(parts, progress)
    while not _finished(parts, progress):
        with pace.waiting():
            batch = next(parts.batches)
        totals = _agree(parts, batch, clock)
        seconds = totals.milliseconds / 1000
        rate = learning_rate(parts.config.schedule, parts.config.optimizer.lr, progress.step, parts.steps, seconds)
        loss, result = _train_step(parts.engine, batch, totals.masked, rate)
        interval.add(loss, totals)
        pace.add(totals.tokens)
        progress = _advance(parts, progress, totals, result)

        last = _finished(parts, progress)
        stop = totals.stop_wishes > 0 and not last
        if last or progress.step % parts.config.run.log_every == 0:
            _log(parts, progress, interval, pace, rate, result)
            interval = _Interval()
        if _evaluation_due(parts, progress) and not stop:
            with pace.paused():
                progress = _evaluate(parts, progress)
        if last or stop or totals.save_wishes or _divides(parts.config.checkpoint.every_steps, progress.step):
            with pace.paused():
                _save(parts, replace(progress, seconds=clock.seconds), interval)
            clock.saved()
        if stop:
            log.info("stopping after step %d: %s", progress.step, parts.stop.reason or "another rank was asked to")
            return Outcome.STOPPED
    return Outcome.DONE


class _Clock:
    """Seconds of training, over all attempts, and since the last checkpoint."""

    def __init__(self, seconds_before: float) -> None:
        self._began = time.monotonic() - seconds_before
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def minutes_since_saved(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def saved(self) -> None:
        self._saved = time.monotonic()


def _agree(parts: Parts, batch: RankBatch, clock: _Clock) -> _Totals:
    every_minutes = parts.config.checkpoint.every_minutes
    on_rank_0 = parts.engine.world.rank == 0
    save = on_rank_0 and every_minutes is not None and clock.minutes_since_saved >= every_minutes
    stop = parts.stop.reason is not None
    milliseconds = int(clock.seconds * 1000) if on_rank_0 else 0
    counts = (batch.masked_tokens, batch.tokens, batch.squared_lengths, int(stop), int(save), milliseconds)
    masked, tokens, squared_lengths, stops, saves, spent, *by_corpus = parts.agreement.totals(
        [*counts, *batch.corpus_tokens]
    )
    return _Totals(masked, tokens, squared_lengths, stops, saves, spent, tuple(by_corpus))


def _train_step(engine: Engine, batch: RankBatch, global_masked: int, rate: float) -> tuple[Tensor, StepResult]:
    """Consume one global batch; returns this rank's summed loss. One without any predicted token updates nothing."""
    if global_masked == 0:
        return torch.zeros((), device=engine.device), StepResult(applied=False, grad_norm=0.0)
    engine.begin_step(batch.step, rate)
    losses = [
        engine.accumulate(microbatch, global_masked, batch.step, number)
        for number, microbatch in enumerate(batch.microbatches)
    ]
    return torch.stack(losses).sum(dtype=torch.float64), engine.step()


def _advance(parts: Parts, progress: Progress, totals: _Totals, result: StepResult) -> Progress:
    before = progress.tokens_by_corpus
    of_step = zip(parts.corpora, totals.corpus_tokens, strict=True)
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + totals.tokens,
        tokens_by_corpus=before | {name: before.get(name, 0) + tokens for name, tokens in of_step},
        seconds=totals.milliseconds / 1000,
        skipped_steps=progress.skipped_steps + (not result.applied),
        overflows=progress.overflows + parts.engine.overflowed(result),
        evaluated=False,
    )


def _save(parts: Parts, progress: Progress, interval: _Interval) -> None:
    interval.reduce(parts.engine.device)
    parts.save(replace(progress, interval_losses=tuple(interval.losses), interval_masked=interval.masked))


def _log(
    parts: Parts, progress: Progress, interval: _Interval, pace: Throughput, rate: float, result: StepResult
) -> None:
    interval.reduce(parts.engine.device)
    lap = pace.lap()
    mfu = None
    if parts.peak_flops is not None:
        flops = sum(parts.flops.per_step(step.tokens, step.squared_lengths, step.masked) for step in interval.totals)
        mfu = flops / lap.seconds / (parts.peak_flops * parts.engine.world.size)
    if parts.tracker is not None:
        parts.tracker.log(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": sum(interval.losses) / interval.masked if interval.masked else None,
                "lr": rate,
                "grad_norm": result.grad_norm,
                "loss_scale": parts.engine.loss_scale,
                "skipped_steps": progress.skipped_steps,
                "overflows": progress.overflows if parts.engine.precision == "fp16" else None,
                "tokens_per_second": lap.tokens_per_second,
                "mfu": mfu,
                "data_wait": lap.data_wait,
                "memory": device_memory(),
                **_tokens_by_corpus(progress),
            }
        )


def _tokens_by_corpus(progress: Progress) -> dict[str, int]:
    of = progress.tokens_by_corpus
    return {f"tokens/{name}": tokens for name, tokens in of.items()} if len(of) > 1 else {}


def _finished(parts: Parts, progress: Progress) -> bool:
    if parts.steps is not None:
        return progress.step >= parts.steps
    budget = parts.config.schedule.budget_seconds
    return budget is not None and progress.seconds >= budget


def _evaluation_due(parts: Parts, progress: Progress) -> bool:
    return (
        progress.step == 0 or _finished(parts, progress) or _divides(parts.config.evaluation.every_steps, progress.step)
    )


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _evaluate(parts: Parts, progress: Progress) -> Progress:
    metrics = parts.evaluate()
    if parts.tracker is not None and metrics:
        parts.tracker.log({"step": progress.step, "tokens": progress.tokens, **metrics})
    return replace(progress, evaluated=True)


def fork_of(progress: Progress) -> Progress:
    """Where a fork of a run begins: at its step and tokens. The clock, the log interval and evaluations are its own."""
    return Progress(step=progress.step, tokens=progress.tokens, tokens_by_corpus=progress.tokens_by_corpus)


def progress_of(state: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's state.json holds."""
    saved = state["progress"]
    return Progress(**{**saved, "interval_losses": tuple(saved["interval_losses"])})
