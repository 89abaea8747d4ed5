"""The training loop: load, step, log, evaluate, save."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.meters import Throughput, device_memory
from experiment.run_folder import Outcome
from experiment.tracking import Tracker
from pretrain.batching.batch import RankBatch
from pretrain.config import PretrainConfig
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.partitions import all_finite, loss_scaler_state, restore_loss_scaler
from pretrain.modeling.flops import FlopsModel
from pretrain.training.early_stopping import EvaluationHistory, Metrics, judge, out_of_patience, overfitted
from pretrain.training.health import (
    MOST_IN_A_ROW,
    MOST_REWINDS,
    Fault,
    UnhealthyError,
    diagnose,
    in_a_row,
    norm_limit,
    remember,
)
from pretrain.training.host_group import HostGroup
from pretrain.training.progress import Progress
from pretrain.training.replicas import compare_replicas
from pretrain.training.schedules import learning_rate
from pretrain.training.stop_request import StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the loop drives, built elsewhere."""

    config: PretrainConfig
    engine: Engine
    agreement: HostGroup
    batches: Callable[[int], Iterator[RankBatch]]  # from a step on
    steps: int | None  # in the whole run; None: schedule.budget ends it
    corpora: tuple[str, ...]  # names of those that are trained on
    evaluate: Callable[[], dict[str, float | int | None]]  # flat metrics
    save: Callable[[Progress], None]
    saved: int | None  # the step of the checkpoint that the run goes on from; None: it begins
    go_back: Callable[[], Progress]  # to the newest checkpoint
    set_aside: Callable[[RankBatch, list[float], Fault], Path]  # a bad batch and its microbatches' losses
    stop: StopRequest
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

    def add(self, losses: Tensor | None, totals: _Totals) -> None:
        """Losses: of this rank's microbatches; None where the step was not trained on."""
        self.totals.append(totals)
        if losses is not None:
            self.pending.append(losses.sum(dtype=torch.float64))
            self.masked += totals.masked

    def reduce(self, device: torch.device) -> None:
        """Bring all losses to the host. Collective; the interval's only wait for the device."""
        if self.pending:
            summed = torch.stack([loss.to(device, torch.float64) for loss in self.pending])
            dist.all_reduce(summed)
            self.losses += summed.tolist()
            self.pending.clear()


class _Update(NamedTuple):
    """What has become of one global batch."""

    result: StepResult = StepResult(applied=False, grad_norm=math.nan)
    losses: Tensor | None = None  # of each microbatch of this rank, summed; None: it was not trained on
    fault: Fault | None = None


@dataclass
class _State:
    """What changes as the loop goes round."""

    progress: Progress
    interval: _Interval
    batches: Iterator[RankBatch]
    saved: int | None  # the step of the newest checkpoint
    rewinds: int = 0  # since it was saved
    logged: int = -1  # events up to this step have been logged before the run went back


def train(parts: Parts, progress: Progress) -> Outcome:
    """Train from `progress` to the end, or until a rank is asked to stop; the last step reached is saved.

    Raises UnhealthyError, on all ranks, where the run cannot go on.
    """
    clock, pace = _Clock(progress.seconds), Throughput()
    state = _State(progress, _interval_of(progress), parts.batches(progress.step), parts.saved)
    with pace.paused():
        _begin(parts, state)
    while not _finished(parts, state.progress):
        with pace.waiting():
            batch = next(state.batches)
        totals = _agree(parts, batch, clock)
        seconds = totals.milliseconds / 1000
        rate = learning_rate(parts.config.schedule, parts.config.optimizer.lr, batch.step, parts.steps, seconds)
        update = _train_step(parts, state.progress, batch, totals.masked, rate)
        if update.fault is not None:
            with pace.paused():
                if _act_on(parts, state, batch, update):
                    continue
            update = _Update()  # as it would be after a rewind, when the step is known as bad
        state.interval.add(update.losses, totals)
        pace.add(totals.tokens)
        state.progress = _advance(parts, state.progress, totals, update)
        if _divides(parts.config.health.compare_every, state.progress.step) and parts.engine.world.size > 1:
            compare_replicas(parts.engine, parts.agreement, batch, rate)

        last = _finished(parts, state.progress)
        stop = totals.stop_wishes > 0 and not last
        if last or _divides(parts.config.run.log_every, state.progress.step):
            _log(parts, state, pace, rate, update)
        if _evaluation_due(parts, state.progress) and not stop:
            with pace.paused():
                _evaluate(parts, state)
        if stop or totals.save_wishes or _save_due(parts, state.progress):
            with pace.paused():
                _save(parts, state, clock.seconds)
            clock.saved()
        if stop:
            log.info(
                "stopping after step %d: %s", state.progress.step, parts.stop.reason or "another rank was asked to"
            )
            return Outcome.STOPPED
    _tell_why_it_ends(parts, state.progress.standing)
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


def _train_step(parts: Parts, progress: Progress, batch: RankBatch, global_masked: int, rate: float) -> _Update:
    """Consume one global batch. One that is known as bad, or without any predicted token, is not trained on."""
    if global_masked == 0 or batch.step + 1 in progress.skipped:
        return _Update()
    engine = parts.engine
    scaler = loss_scaler_state(engine.deepspeed)
    engine.begin_step(batch.step, rate)
    losses = torch.stack(
        [
            engine.accumulate(microbatch, global_masked, batch.step, number)
            for number, microbatch in enumerate(batch.microbatches)
        ]
    )
    result = engine.step(norm_limit(progress.norms, parts.config.health.spike_factor))
    if result.applied:
        return _Update(result, losses)
    loss = losses.sum(dtype=torch.float64)
    dist.all_reduce(loss)
    mean = loss.item() / global_masked
    scaled = engine.loss_scale is not None
    fault = diagnose(batch.step + 1, mean, result.grad_norm, progress.norms, scaled)
    if fault is None:
        engine.check_loss_scale()
    else:
        restore_loss_scaler(engine.deepspeed, scaler)  # which takes any gradient that is not finite for an overflow
    return _Update(result, losses, fault)


def _act_on(parts: Parts, state: _State, batch: RankBatch, update: _Update) -> bool:
    """Do what the policy says of a bad batch. Returns whether the run has gone back to its last checkpoint.

    Raises UnhealthyError where it ends here.
    """
    assert update.fault is not None
    assert update.losses is not None
    fault, policy = update.fault, parts.config.health.policy
    what = f"{fault}\n  its batch: {parts.set_aside(batch, update.losses.tolist(), fault)}"
    if policy == "stop":
        log.error("%s", what)  # now: the save may fail
        raise UnhealthyError(f"{fault}\n{_rescue(parts, state)}")
    skipped = (*state.progress.skipped, fault.step)
    if in_a_row(skipped, fault.step) >= MOST_IN_A_ROW:
        raise UnhealthyError(f"{what}\n  the last {MOST_IN_A_ROW} steps were all bad: it is the weights\n{_REMEDY}")
    if policy == "rewind" and state.rewinds >= MOST_REWINDS:
        raise UnhealthyError(f"{what}\n  the run has gone back to step {state.saved} {MOST_REWINDS} times\n{_REMEDY}")
    state.progress = replace(state.progress, skipped=skipped)
    if policy == "rewind":
        _go_back(parts, state)
        log.warning("%s\n  policy: going back to step %d, from where it is left out", what, state.progress.step)
        return True
    log.warning("%s\n  policy: it is left out", what)
    return False


_REMEDY = (
    "  to try: fork an earlier checkpoint (run.resume), or begin again, with a lower optimizer.lr, a longer "
    "schedule.warmup_steps or a smaller optimizer.grad_clip"
)


def _rescue(parts: Parts, state: _State) -> str:
    """Save the state before a bad batch if it is any good; returns what can be done then."""
    (broken,) = parts.agreement.totals([int(not all_finite(parts.engine.deepspeed))])
    if broken:
        return f"  the weights before it: not finite either, so not saved\n{_REMEDY}"
    _save(parts, state, state.progress.seconds)
    return (
        "  the state before it: saved; the same command with --health.policy=skip leaves the batch out and goes on\n"
        f"  should more follow, it is the weights and not the data\n{_REMEDY}"
    )


def _go_back(parts: Parts, state: _State) -> None:
    """To the newest checkpoint; what is known as bad stays known. Events logged before are not logged again."""
    reached = state.progress
    del state.batches  # and its worker processes
    progress = parts.go_back()
    state.progress = replace(progress, skipped=reached.skipped)
    state.interval = _interval_of(progress)
    state.batches = parts.batches(progress.step)
    state.saved = progress.step
    state.rewinds += 1
    state.logged = max(state.logged, reached.step)
    _begin(parts, state)


def _advance(parts: Parts, progress: Progress, totals: _Totals, update: _Update) -> Progress:
    before = progress.tokens_by_corpus
    of_step = zip(parts.corpora, totals.corpus_tokens, strict=True)
    applied, norm = update.result
    overflowed = update.losses is not None and update.fault is None and parts.engine.overflowed(update.result)
    thaws = progress.step + 1 == parts.config.model.freeze_steps  # the norm will be one of more parameters
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + totals.tokens,
        tokens_by_corpus=before | {name: before.get(name, 0) + tokens for name, tokens in of_step},
        seconds=totals.milliseconds / 1000,
        skipped_steps=progress.skipped_steps + (not applied),
        overflows=progress.overflows + overflowed,
        norms=() if thaws else remember(progress.norms, norm) if applied else progress.norms,
        evaluated=False,
    )


def _begin(parts: Parts, state: _State) -> None:
    """What may be due before the next step."""
    if _evaluation_due(parts, state.progress) and not state.progress.evaluated:
        _evaluate(parts, state)
    no_way_back = state.saved is None and parts.config.health.policy == "rewind"
    if no_way_back or _is_best(state.progress):
        _save(parts, state, state.progress.seconds)


def _save(parts: Parts, state: _State, seconds: float) -> None:
    """Save a checkpoint of this step, unless there is one."""
    interval = state.interval
    interval.reduce(parts.engine.device)
    if state.saved != state.progress.step:
        parts.save(
            replace(
                state.progress,
                seconds=seconds,
                interval_losses=tuple(interval.losses),
                interval_masked=interval.masked,
            )
        )
        state.saved, state.rewinds = state.progress.step, 0


def _save_due(parts: Parts, progress: Progress) -> bool:
    return (
        _finished(parts, progress) or _is_best(progress) or _divides(parts.config.checkpoint.every_steps, progress.step)
    )


def _is_best(progress: Progress) -> bool:
    return progress.standing.best_step == progress.step


def _log(parts: Parts, state: _State, pace: Throughput, rate: float, update: _Update) -> None:
    """Log the interval and begin the next one."""
    interval, progress = state.interval, state.progress
    interval.reduce(parts.engine.device)
    loss_sum, lap = sum(interval.losses), pace.lap()
    mfu = None
    if parts.peak_flops is not None:
        flops = sum(parts.flops.per_step(step.tokens, step.squared_lengths, step.masked) for step in interval.totals)
        mfu = flops / lap.seconds / (parts.peak_flops * parts.engine.world.size)
    _track(
        parts,
        state,
        {
            "loss": loss_sum / interval.masked if interval.masked else None,
            "lr": rate,
            "grad_norm": update.result.grad_norm,
            "loss_scale": parts.engine.loss_scale,
            "skipped_steps": progress.skipped_steps,
            "overflows": progress.overflows if parts.engine.precision == "fp16" else None,
            "tokens_per_second": lap.tokens_per_second,
            "mfu": mfu,
            "data_wait": lap.data_wait,
            "memory": device_memory(),
            **_tokens_by_corpus(progress),
        },
    )
    state.progress = replace(progress, loss_sum=progress.loss_sum + loss_sum, masked=progress.masked + interval.masked)
    state.interval = _Interval()


def _track(parts: Parts, state: _State, metrics: Metrics) -> None:
    """Log an event of this step, unless it was logged before the run went back."""
    if parts.tracker is not None and state.progress.step > state.logged:
        parts.tracker.log({"step": state.progress.step, "tokens": state.progress.tokens, **metrics})


def _tokens_by_corpus(progress: Progress) -> dict[str, int]:
    of = progress.tokens_by_corpus
    return {f"tokens/{name}": tokens for name, tokens in of.items()} if len(of) > 1 else {}


def _finished(parts: Parts, progress: Progress) -> bool:
    if out_of_patience(progress.standing, parts.config.evaluation):
        return True
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


def _evaluate(parts: Parts, state: _State) -> None:
    progress, interval, config = state.progress, state.interval, parts.config.evaluation
    metrics = parts.evaluate()
    if metrics:
        _track(parts, state, metrics)
    interval.reduce(parts.engine.device)
    trained = (progress.loss_sum + sum(interval.losses), progress.masked + interval.masked)
    standing = judge(progress.standing, config, progress.step, metrics, trained)
    for name in overfitted(standing, config):
        log.warning(
            "step %d: overfitting: the loss on %s has risen for %d evaluations while the training loss fell",
            progress.step,
            name,
            config.overfitting_after,
        )
    state.progress = replace(progress, standing=standing, evaluated=True)


def _tell_why_it_ends(parts: Parts, standing: EvaluationHistory) -> None:
    if out_of_patience(standing, parts.config.evaluation):
        log.info(
            "ending early: %s has not improved for %d evaluations; the best was %.4g at step %s",
            standing.metric,
            standing.waited,
            standing.best,
            standing.best_step,
        )


def _interval_of(progress: Progress) -> _Interval:
    return _Interval(list(progress.interval_losses), progress.interval_masked)
