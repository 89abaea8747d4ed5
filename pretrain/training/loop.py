"""The training loop: load, step, log, evaluate, save."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

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
    seconds: float = 0.0  # spent training, over all attempts
    interval_losses: tuple[float, ...] = ()  # summed loss of each step since the last log event
    interval_masked: int = 0  # predicted tokens in them
    evaluated: bool = False  # whether this step's evaluation, if one is due, is done


@dataclass(frozen=True)
class Parts:
    """What the loop drives, built elsewhere."""

    config: PretrainConfig
    engine: Engine
    agreement: Agreement
    batches: Iterator[RankBatch]  # from the first step that is not done
    steps: int  # in the whole run
    evaluate: Callable[[], dict[str, float | int | None]]  # flat metrics
    save: Callable[[Progress], None]
    stop: StopWish
    tracker: Tracker | None  # on rank 0
    flops: FlopsModel
    peak_flops: float | None  # of one device


@dataclass
class _Interval:
    """The losses since the last log event, one number a step, summed over the ranks when they are asked for.

    Each step's loss is reduced on its own and added up in the order of the steps, so that a run that was stopped in
    the middle of an interval logs the same figure as one that was not.
    """

    losses: list[float]
    masked: int
    pending: list[Tensor] = field(default_factory=list)  # of this rank, still on the device
    squared_lengths: int = 0
    timed_tokens: int = 0  # since this process began the interval, as are the next
    timed_masked: int = 0

    def reduce(self, device: torch.device) -> None:
        if self.pending:
            summed = torch.stack([loss.to(device, torch.float64) for loss in self.pending])
            dist.all_reduce(summed)
            self.losses += summed.tolist()
            self.pending.clear()


def train(parts: Parts, progress: Progress) -> Outcome:
    """Train from `progress` to the last step, or until a rank is asked to stop; the last step reached is saved."""
    config = parts.config
    interval = _Interval(list(progress.interval_losses), progress.interval_masked)
    pace = Throughput()
    began = saved_at = time.monotonic()
    seconds_before = progress.seconds
    if _evaluation_due(parts, progress.step) and not progress.evaluated:
        progress = _evaluate(parts, progress)
        pace = Throughput()
    while progress.step < parts.steps:
        with pace.waiting():
            batch = next(parts.batches)
        assert batch.step == progress.step
        minutes = config.checkpoint.every_minutes
        wishes = [parts.stop.reason is not None, minutes is not None and time.monotonic() - saved_at > 60 * minutes]
        if parts.engine.world.rank != 0:
            wishes[1] = False  # one clock: rank 0's
        counts = [batch.masked_tokens, batch.tokens, batch.squared_lengths, *wishes]
        masked, tokens, squared_lengths, stop_wishes, save_wishes = parts.agreement.totals(
            [int(count) for count in counts]
        )

        rate = learning_rate(config.schedule, config.optimizer.lr, progress.step, parts.steps)
        result = _train_step(parts.engine, batch, masked, rate, interval)

        interval.masked += masked
        interval.timed_masked += masked
        interval.timed_tokens += tokens
        interval.squared_lengths += squared_lengths
        pace.add(tokens)
        progress = replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + tokens,
            seconds=seconds_before + time.monotonic() - began,
            evaluated=False,
        )
        last = progress.step == parts.steps
        if last or progress.step % config.run.log_every == 0:
            _log(parts, progress, interval, pace, rate, result)
            interval = _Interval([], 0)
        stop = bool(stop_wishes) and not last
        if _evaluation_due(parts, progress.step) and not stop:
            progress = _evaluate(parts, progress)
        every = config.checkpoint.every_steps
        if last or stop or save_wishes or (every is not None and progress.step % every == 0):
            interval.reduce(parts.engine.device)
            parts.save(replace(progress, interval_losses=tuple(interval.losses), interval_masked=interval.masked))
            saved_at = time.monotonic()
        if stop:
            log.info("stopping after step %d: %s", progress.step, parts.stop.reason or "another rank was asked to")
            return Outcome.STOPPED
    return Outcome.DONE


def _train_step(engine: Engine, batch: RankBatch, global_masked: int, rate: float, interval: _Interval) -> StepResult:
    """One consumed global batch. One without any predicted token updates nothing."""
    if global_masked == 0:
        interval.pending.append(torch.zeros((), device=engine.device))
        return StepResult(applied=False, grad_norm=0.0)
    engine.set_learning_rate(rate)
    losses = [
        engine.accumulate(microbatch, global_masked, batch.step, number)
        for number, microbatch in enumerate(batch.microbatches)
    ]
    interval.pending.append(torch.stack(losses).sum(dtype=torch.float64))
    return engine.step()


def _log(
    parts: Parts, progress: Progress, interval: _Interval, pace: Throughput, rate: float, result: StepResult
) -> None:
    interval.reduce(parts.engine.device)
    lap = pace.lap()
    mfu = None
    if parts.peak_flops is not None:
        flops = parts.flops.per_step(interval.timed_tokens, interval.squared_lengths, interval.timed_masked)
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
                "tokens_per_second": lap.tokens_per_second,
                "mfu": mfu,
                "data_wait": lap.data_wait,
                "memory": device_memory(),
            }
        )


def _evaluation_due(parts: Parts, step: int) -> bool:
    return step in (0, parts.steps) or step % parts.config.evaluation.every_steps == 0


def _evaluate(parts: Parts, progress: Progress) -> Progress:
    metrics = parts.evaluate()
    if parts.tracker is not None and metrics:
        parts.tracker.log({"step": progress.step, "tokens": progress.tokens, **metrics})
    return replace(progress, evaluated=True)


def progress_of(state: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's state.json holds."""
    saved = state["progress"]
    return Progress(**{**saved, "interval_losses": tuple(saved["interval_losses"])})
