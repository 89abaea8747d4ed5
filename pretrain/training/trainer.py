"""The training loop: load, step, log, evaluate, save."""

import logging
import math
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.goodput import CHECKPOINTING, DATA, EVALUATING, STARTING, ActivityTimer
from experiment.hardware import peak_flops, peak_memory
from experiment.outcome_file import Outcome
from experiment.throughput_meter import Throughput
from experiment.tracking import Trackers
from experiment.tracking.alerts import Alert
from experiment.tracking.downstream import DownstreamLog
from experiment.tracking.jsonl import Metrics
from experiment.tracking.tracker import CLOSE_SECONDS
from pretrain.batching.batch import Microbatch, RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.phases import phase
from pretrain.evaluate import open_evaluator
from pretrain.modeling.build import BuiltModel
from pretrain.modeling.masked_lm import Predictions
from pretrain.resolve import ResolvedRun
from pretrain.training.bad_batch_dump import BadBatchWriter
from pretrain.training.checkpoint_alarm import CheckpointAlarm
from pretrain.training.checkpointer import Checkpointer, load_resumed
from pretrain.training.clock import TrainingClock
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.early_stopping import newly_overfitting, should_stop_early, update_history
from pretrain.training.health import (
    HEALTH_LIMITS,
    Fault,
    HealthLimits,
    UnhealthyError,
    append_norm,
    diagnose,
    norm_limit,
)
from pretrain.training.learning_rate import learning_rate
from pretrain.training.log_interval import LogInterval
from pretrain.training.profiler import StepProfiler
from pretrain.training.recovery import ADVICE, Recovery, Response
from pretrain.training.replicas import compare_replicas
from pretrain.training.run_start import open_run_tracker, record_start
from pretrain.training.slow_ranks import SlowRanks
from pretrain.training.step_agreement import PendingTotals, StepAgreement, StepTotals
from pretrain.training.stop_request import StopRequest
from pretrain.training.training_progress import TrainingProgress
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)


# Timeout for a batch, as a fraction of `health.hang_seconds`: a rank whose data worker hangs reports it before it or
# the ranks that wait for it count as hung.
_DATA_TIMEOUT = 0.7


class Update(NamedTuple):
    """The result of training on one global batch."""

    result: StepResult = StepResult(applied=False, grad_norm=math.nan)
    losses: Tensor | None = None  # summed, of each microbatch of this rank; None: the batch was not trained on
    fault: Fault | None = None


class UpcomingBatch(NamedTuple):
    """This rank's share of a global batch that has not been trained on yet."""

    share: RankBatch | DataWorkerError | None  # None: the stream has ended
    agreement: PendingTotals  # on its token counts, and that all ranks have their share

    def wait(self, group: CpuGroup) -> tuple[RankBatch, StepTotals]:
        """The share, and the totals of the batch. Collective.

        Raises DataWorkerError on all ranks if one has no share: only now, so that the step before it is completed.
        """
        totals = self.agreement.wait()
        if totals.failed_batches:
            failure = str(self.share) if isinstance(self.share, DataWorkerError) else None
            raise DataWorkerError(group.first_message(failure, always_name_rank=True))
        assert isinstance(self.share, RankBatch), "the run ends with the stream"
        return self.share, totals


class Trainer:
    """Trains one run on this rank. Every public method is collective."""

    def __init__(
        self,
        run: ResolvedRun,
        model: BuiltModel,
        engine: Engine,
        stream: TrainingStream,
        group: CpuGroup,
        times: ActivityTimer,
        limits: HealthLimits = HEALTH_LIMITS,
    ) -> None:
        """Loads the checkpoint that the run resumes from, if any, and opens the trackers. Raises AgreedError."""
        config, world = run.config, engine.world
        self._config = config
        self._flops = model.flops
        self._engine = engine
        self._stream = stream
        self._group = group
        self._times = times
        self._limits = limits
        self._on_gpu = engine.device.type == "cuda"
        self._evaluator = group.call(lambda: open_evaluator(run, stream.rows, model.first_position, world))
        self._progress = load_resumed(run.resume_plan, engine)
        self._first_step = self._progress.step if run.resume_plan.fork else 0
        (num_hosts,) = group.all_reduce_sum([int(world.local_rank == 0)])
        self._slow_ranks = SlowRanks(group.all_gather_objects(platform.node()))
        self._data_seconds = 0.0  # that this rank has waited for data since it last reported its work
        provenance = group.from_rank0(lambda: record_start(run, world.size, num_hosts))
        self._tracker: Trackers | None = None
        if world.rank == 0:
            if not self._is_finished():  # else the time since its end would count as down
                times.open(run.folder, self._progress.step, stream.steps)
            self._tracker = open_run_tracker(
                run, provenance, self._progress.step, stream, self._is_evaluation_missing()
            )
        self._downstream = DownstreamLog(run.folder)
        self._checkpointer = Checkpointer(run, engine, model.model, group, provenance)
        self._checkpoint_alarm = CheckpointAlarm(config.tracking.alerts.no_checkpoint_hours)
        self._recovery = Recovery(config.health, limits)
        self._bad_batches = BadBatchWriter(run.folder, world, stream.corpora, run.tokenizer.decode)
        self._clock, self._throughput = TrainingClock(self._progress.seconds), Throughput()
        self._agreement = StepAgreement(group, world, self._clock, config.checkpoint.every_minutes, len(stream.corpora))
        self._profiler = StepProfiler(run.folder.profile) if config.run.profile and world.rank == 0 else None
        self._logged_step = -1  # events up to this step were logged before a rewind
        self._open_data()

    def train(self, stop: StopRequest) -> Outcome:
        """Train to the end, or until a rank is asked to stop. Saves the last step.

        Raises UnhealthyError, LossScaleError, UnwritableError or DataWorkerError, each on all ranks, if the run cannot
        continue.
        """
        self._times.begin_training()
        self._evaluate_and_save_if_due()
        upcoming: UpcomingBatch | None = None
        while not self._is_finished():
            upcoming = upcoming or self._take_batch(stop)
            batch, totals = upcoming.wait(self._group)
            upcoming = self._take_batch(stop)  # agreed on while this one is computed
            rate = self._learning_rate(batch.step, totals.seconds)
            update = self._train_step(batch, totals.masked_tokens, rate)
            with phase("wait for ranks"):
                agreed = upcoming.agreement.wait()
            with self._throughput.saving(), self._times.during(CHECKPOINTING, recorded=False):
                self._checkpointer.advance_if_done(agreed.ranks_done)
            if self._profiler is not None:
                self._profiler.step()
            if update.fault is not None:
                recovered = self._recover(batch, update.fault, update.losses)
                if recovered is None:  # rewound
                    upcoming = None
                    continue
                update = recovered
            self._advance(totals, update)
            if self._is_due(self._config.health.compare_every) and self._engine.world.size > 1:
                compare_replicas(self._engine, self._group, batch, rate)

            finished = self._is_finished()
            stopping = agreed.stop_requests > 0 and not finished
            if finished or self._is_due(self._config.run.log_every):
                self._log(rate, update.result.grad_norm, agreed.work_microseconds)
            if self._is_evaluation_due() and not stopping:
                self._evaluate()
            if stopping or agreed.save_requests or self._is_save_due():
                self._save(self._clock.seconds, now=stopping or self._is_finished())
                self._clock.restart_save_timer()
            if stopping:
                log.info("stopping after step %d: %s", self._progress.step, stop.reason or "on another rank")
                return Outcome.STOPPED
        self._log_early_stop()
        return Outcome.DONE

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any. Collective."""
        self._checkpointer.wait()

    def close(self, outcome: Outcome) -> None:
        """Close the trackers, which may wait for servers until their timeouts. Collective unless the run has failed.

        Raises TimeoutError if they wait far longer, as for a disk that does not answer; not if the run has failed.
        """
        if self._profiler is not None:
            self._profiler.close()
        self._times.end_training()
        thread = ThreadPoolExecutor(1, "trackers")
        closing = thread.submit(self._close_tracker, outcome)
        thread.shutdown(wait=False)
        if outcome is Outcome.FAILED:
            wait([closing], CLOSE_SECONDS)
        else:
            deadline = time.monotonic() + CLOSE_SECONDS
            self._group.wait_for_all(closing, lambda: time.monotonic() < deadline)
            closing.result()
        self._times.record()

    def _close_tracker(self, outcome: Outcome) -> None:
        if self._tracker is not None:
            self._tracker.close(outcome)

    def _open_data(self) -> None:
        """Start the log interval and the data stream at the current progress."""
        progress = self._progress
        self._interval = LogInterval(progress.interval_losses, progress.interval_masked)
        self._batches: Iterator[RankBatch] = self._stream.load(
            progress.step, self._on_gpu, timeout=_DATA_TIMEOUT * self._config.health.hang_seconds
        )

    def _evaluate_and_save_if_due(self) -> None:
        """Before the next step. An evaluation that was left to this attempt is added to the checkpoint of its step."""
        evaluates = self._is_evaluation_missing()
        if evaluates:
            self._evaluate()
        needs_rewind_target = self._checkpointer.saved_step is None and self._config.health.policy == "rewind"
        if evaluates and self._checkpointer.saved_step == self._progress.step:
            self._checkpointer.update(self._progress_to_save(self._progress.seconds))
        elif needs_rewind_target or self._is_best_step() or self._is_finished():
            self._save(self._progress.seconds, now=needs_rewind_target or self._is_finished())

    def _take_batch(self, stop: StopRequest) -> UpcomingBatch:
        """Take the next batch, if there is one, and begin to agree on it."""
        share: RankBatch | DataWorkerError | None
        started = time.perf_counter()
        with self._throughput.waiting(), self._times.during(DATA, recorded=False), phase("data"):
            try:
                share = next(self._batches, None)
            except DataWorkerError as error:
                share = error
        stop_requested, part_done = stop.reason is not None, self._checkpointer.is_part_done
        self._data_seconds += time.perf_counter() - started
        return UpcomingBatch(share, self._agreement.begin(share, stop_requested, part_done, self._take_work_seconds()))

    def _take_work_seconds(self) -> float | None:
        """How long this rank has worked without waiting for others since the last log event; 0 if no forward pass has
        ended since; None if the next step is not logged."""
        timer = self._engine.forward_timer
        if not timer.enabled or (self._progress.step + 1) % self._config.run.log_every:
            return None
        data_seconds, self._data_seconds = self._data_seconds, 0.0
        forward_seconds = timer.take()
        return forward_seconds + data_seconds if forward_seconds else 0.0

    def _learning_rate(self, step: int, seconds: float) -> float:
        return learning_rate(self._config.schedule, self._config.optimizer.lr, step, self._stream.steps, seconds)

    def _train_step(self, batch: RankBatch, global_masked: int, rate: float) -> Update:
        """Consume one global batch. A batch known to be bad, or without masked tokens, is not trained on."""
        if global_masked == 0 or batch.step + 1 in self._progress.bad_steps:
            return Update()
        engine, norms = self._engine, self._progress.grad_norms
        scaler = engine.loss_scaler_state()
        engine.begin_step(batch.step, rate)
        losses = torch.stack(
            [
                self._accumulate(microbatch, global_masked, batch.step, number)
                for number, microbatch in enumerate(batch.microbatches)
            ]
        )
        result = engine.step(norm_limit(norms, self._config.health.spike_factor, self._limits))
        if result.applied:
            return Update(result, losses)
        loss = losses.sum(dtype=torch.float64)
        dist.all_reduce(loss)
        mean_loss = loss.item() / global_masked
        fault = diagnose(batch.step + 1, mean_loss, result.grad_norm, norms, scaled=engine.loss_scale is not None)
        if fault is None:
            engine.check_loss_scale()
        else:
            engine.load_loss_scaler_state(scaler)  # which treats every gradient that is not finite as an overflow
        return Update(result, losses, fault)

    def _accumulate(self, microbatch: Microbatch, global_masked: int, step: int, number: int) -> Tensor:
        loss = self._engine.accumulate(microbatch, global_masked, step, number)
        self._times.make_progress()
        return loss

    def _predict(self, microbatch: Microbatch) -> Predictions:
        self._times.make_progress()
        return self._engine.predict(microbatch)

    def _recover(self, batch: RankBatch, fault: Fault, losses: Tensor | None) -> Update | None:
        """Respond to a bad batch as `health.policy` says: skip it, or rewind and return None.

        Raises UnhealthyError if the run ends here.
        """
        assert losses is not None, "a batch that was not trained on has no fault"
        with self._throughput.paused():
            dumped = self._bad_batches.dump_bad_batch(batch, losses.tolist(), fault)
        with self._throughput.saving(), self._times.during(CHECKPOINTING):
            self._checkpointer.wait()  # it may be the one to go back to
        what = f"{fault}\n  its batch: {dumped}"
        if self._tracker is not None:
            self._tracker.alert(Alert("bad_batch", f"{what}\n  policy: {self._config.health.policy}"))
        bad_steps, saved_step = self._progress.bad_steps, self._checkpointer.saved_step
        response = self._recovery.respond(fault, dumped, bad_steps, saved_step)
        if response is Response.STOP:
            log.error("%s", what)  # before the save, which may fail
            raise UnhealthyError(f"{fault}\n{self._save_before_fault()}")
        self._progress = replace(self._progress, bad_steps=(*bad_steps, fault.step))
        if response is Response.SKIP:
            log.warning("%s\n  policy: skipping it", what)
            return Update()
        self._rewind()
        log.warning("%s\n  policy: rewound to step %d, to skip it", what, self._progress.step)
        return None

    def _save_before_fault(self) -> str:
        """Save the state before a bad batch unless it is broken; returns what the user can do."""
        (broken,) = self._group.all_reduce_sum([int(not self._engine.masters_are_finite())])
        if broken:
            return f"  the weights before it: not finite either, so not saved\n{ADVICE}"
        self._save(self._progress.seconds, now=True)
        return (
            "  the state before it: saved; the same command with --health.policy=skip resumes and skips the batch\n"
            f"  if more batches are bad, the weights have diverged\n{ADVICE}"
        )

    def _rewind(self) -> None:
        """Go back to the newest checkpoint. Bad steps stay known; events logged before are not logged again."""
        reached = self._progress
        with self._throughput.paused(), self._times.during(STARTING):
            del self._batches  # ends its worker processes
            progress = self._checkpointer.load_newest()
            self._progress = replace(progress, bad_steps=reached.bad_steps)
            self._open_data()
        self._logged_step = max(self._logged_step, reached.step)
        self._evaluate_and_save_if_due()

    def _advance(self, totals: StepTotals, update: Update) -> None:
        """Count the step."""
        self._interval.add(update.losses, totals)
        self._throughput.add(totals.tokens)
        progress, result = self._progress, update.result
        by_corpus = dict(progress.tokens_by_corpus)
        for name, tokens in zip(self._stream.corpora, totals.corpus_tokens, strict=True):
            by_corpus[name] = by_corpus.get(name, 0) + tokens
        norms = append_norm(progress.grad_norms, result.grad_norm) if result.applied else progress.grad_norms
        unfreezes = progress.step + 1 == self._config.model.freeze_steps  # later norms cover more parameters
        overflowed = update.losses is not None and update.fault is None and self._engine.overflowed(result)
        self._progress = replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + totals.tokens,
            tokens_by_corpus=by_corpus,
            seconds=totals.seconds,
            skipped_steps=progress.skipped_steps + (not result.applied),
            overflows=progress.overflows + overflowed,
            grad_norms=() if unfreezes else norms,
            evaluated=False,
        )
        self._times.finish_step(self._progress.step)

    def _log(self, rate: float, grad_norm: float, work_by_rank: Sequence[int] = ()) -> None:
        """Log the interval and start the next one. work_by_rank: how long each rank has worked; may be empty."""
        interval, progress = self._interval, self._progress
        interval.all_reduce_losses(self._engine.device)
        pace = self._throughput.lap()
        by_corpus = progress.tokens_by_corpus
        self._track(
            {
                "loss": interval.mean_loss,
                "lr": rate,
                "grad_norm": grad_norm,
                "loss_scale": self._engine.loss_scale,
                "skipped_steps": progress.skipped_steps,
                "overflows": progress.overflows if self._engine.precision == "fp16" else None,
                "tokens_per_second": pace.tokens_per_second,
                "mfu": self._mfu(pace.seconds),
                "data_wait": pace.data_wait,
                "goodput": self._times.goodput,
                "checkpoint_seconds": pace.checkpoint_seconds,
                "memory": peak_memory(),
                **self._slowest_rank(work_by_rank),
                **({f"tokens/{name}": tokens for name, tokens in by_corpus.items()} if len(by_corpus) > 1 else {}),
            }
        )
        self._track_downstream()
        self._check_checkpoints()
        self._times.record()
        self._progress = replace(
            progress,
            loss_sum=progress.loss_sum + interval.loss_sum,
            masked_tokens=progress.masked_tokens + interval.masked_tokens,
        )
        self._interval = LogInterval()

    def _slowest_rank(self, work_by_rank: Sequence[int]) -> Metrics:
        if self._tracker is None or not self._engine.forward_timer.enabled:
            return {}
        slowest = self._slow_ranks.update(work_by_rank)
        if slowest is None:
            return {"slowest_rank": None, "slowest_rank_ratio": None}
        return {"slowest_rank": slowest.rank, "slowest_rank_ratio": slowest.ratio}

    def _mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of the interval; None where the device's peak or the model's FLOPs are unknown."""
        if not self._on_gpu or self._flops is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self._engine.device), self._engine.precision)
        if peak is None:
            return None
        return self._interval.flops(self._flops) / seconds / (peak * self._engine.world.size)

    def _track(self, metrics: Metrics) -> None:
        """Log an event of this step, unless it was logged before a rewind."""
        progress = self._progress
        if self._tracker is not None and progress.step > self._logged_step:
            self._tracker.log({"step": progress.step, "tokens": progress.tokens, **metrics})

    def _track_downstream(self) -> None:
        """Log what `deepcloze watch` has scored since the last log event: events of earlier steps."""
        if self._tracker is not None:
            for event in self._downstream.take_new(self._progress.step):
                self._tracker.log(event)

    def _check_checkpoints(self) -> None:
        """Send an alert if there has been no new one for too long."""
        message = self._checkpoint_alarm.check(self._checkpointer.saved_step)
        if self._tracker is not None and message is not None:
            self._tracker.alert(Alert("no_checkpoint", message))

    def _evaluate(self) -> None:
        with self._throughput.paused(), self._times.during(EVALUATING):
            progress, interval, config = self._progress, self._interval, self._config.evaluation
            metrics = self._evaluator.metrics(self._predict, self._engine.device)
            if metrics:
                self._track(metrics)
            interval.all_reduce_losses(self._engine.device)
            trained = progress.loss_sum + interval.loss_sum, progress.masked_tokens + interval.masked_tokens
            history = update_history(progress.evaluations, config, progress.step, metrics, trained)
            for name in newly_overfitting(history, config):
                log.warning(
                    "step %d: overfitting: the loss on %s has risen for %d evaluations while the training loss fell",
                    progress.step,
                    name,
                    config.overfitting_after,
                )
            self._progress = replace(progress, evaluations=history, evaluated=True)
        if self._is_finished() and interval.losses:  # patience ends the run between two log events
            last_norm = progress.grad_norms[-1] if progress.grad_norms else math.nan
            self._log(self._learning_rate(progress.step - 1, progress.seconds), last_norm)

    def _save(self, seconds: float, now: bool) -> None:
        """Save a checkpoint of this step, unless there is one.

        Args:
            seconds: of training so far.
            now: wait until it is on disk.
        """
        with self._throughput.saving(), self._times.during(CHECKPOINTING):
            progress = self._progress_to_save(seconds)
            if now:
                self._checkpointer.save_now(progress)
            else:
                self._checkpointer.save(progress)

    def _progress_to_save(self, seconds: float) -> TrainingProgress:
        """The progress, with the log interval so far. Collective."""
        self._interval.all_reduce_losses(self._engine.device)
        return replace(
            self._progress,
            seconds=seconds,
            interval_losses=tuple(self._interval.losses),
            interval_masked=self._interval.masked_tokens,
        )

    def _is_finished(self) -> bool:
        progress, schedule = self._progress, self._config.schedule
        if should_stop_early(progress.evaluations, self._config.evaluation):
            return True
        if self._stream.steps is not None:
            return progress.step >= self._stream.steps
        return schedule.budget_seconds is not None and progress.seconds >= schedule.budget_seconds

    def _is_evaluation_due(self) -> bool:
        step = self._progress.step
        return step == self._first_step or self._is_finished() or self._is_due(self._config.evaluation.every_steps)

    def _is_evaluation_missing(self) -> bool:
        """A run that is asked to stop saves at once: the evaluation of that step is left to its next attempt."""
        return self._is_evaluation_due() and not self._progress.evaluated

    def _is_save_due(self) -> bool:
        return self._is_finished() or self._is_best_step() or self._is_due(self._config.checkpoint.every_steps)

    def _is_best_step(self) -> bool:
        return self._progress.evaluations.best_step == self._progress.step

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._progress.step % every == 0

    def _log_early_stop(self) -> None:
        history = self._progress.evaluations
        if should_stop_early(history, self._config.evaluation):
            found = "it was never finite"
            if history.best is not None:
                found = f"the best was {history.best:.4g} at step {history.best_step}"
            log.info(
                "stopping early: %s has not improved for %d evaluations; %s", history.metric, history.waited, found
            )
