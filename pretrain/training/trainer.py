"""The training loop: take a batch, train, respond to a bad one, count, report, evaluate, save."""

import logging
import math
import platform
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.errors import AgreedFailureError
from experiment.run_files.goodput import CHECKPOINTING, STARTING, ActivityTimer
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.provenance import read_provenance
from experiment.tracking.alerts import Alert
from pretrain.batching.batch import RankBatch
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.host_copy import read_numbers
from pretrain.modeling.build import BuiltModel
from pretrain.resolve import ResolvedRun
from pretrain.training.attempt_start import open_run_tracker, record_start
from pretrain.training.background_save import UnwritableError
from pretrain.training.batch_feed import BatchFeed
from pretrain.training.checkpointer import Checkpointer, load_resumed
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.evaluation import RunEvaluator, log_early_stop, open_evaluator, should_stop_early
from pretrain.training.health import ADVICE, BadBatchWriter, Fault, Recovery, append_norm, diagnose, norm_limit
from pretrain.training.learning_rate import ends_early, learning_rate
from pretrain.training.log_interval import LogInterval
from pretrain.training.profiler import StepProfiler
from pretrain.training.replicas import compare_replicas
from pretrain.training.reporter import Reporter
from pretrain.training.step_agreement import DeviceSums, StepAgreement, StepTotals, TrainingClock
from pretrain.training.stop_request import StopRequest
from pretrain.training_progress import TrainingProgress
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)


class TrainedStep(NamedTuple):
    result: StepResult
    losses: Tensor | None  # summed, of each microbatch of this rank; None: the batch was not trained on
    overflowed: bool = False  # the gradients, in fp16, as happens while the loss scale settles: nothing was updated


class FaultyStep(NamedTuple):
    """Training on a bad batch, whose update was not applied."""

    fault: Fault
    losses: Tensor  # summed, of each microbatch of this rank


SKIPPED = TrainedStep(StepResult(applied=False, grad_norm=math.nan), losses=None)
"""A step whose batch was consumed without training on it, or without keeping the result."""


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
    ) -> None:
        """Loads the checkpoint that the run resumes from, if any, and opens the trackers. Raises AgreedError."""
        config, world = run.config, engine.world
        self._config = config
        self._engine = engine
        self._stream = stream
        self._group = group
        self._times = times
        held_out = group.call(lambda: open_evaluator(run, stream.layout, world))
        self._progress = load_resumed(run, model, engine, group)
        self._interval = LogInterval(times, engine.device)
        first_step = self._progress.step if run.resume_plan.fork else 0
        self._evaluator = RunEvaluator(config.evaluation, held_out, engine, self._interval, times, group, first_step)
        (num_hosts,) = group.all_reduce_sum([int(world.local_rank == 0)])
        nodes = group.all_gather_objects(platform.node())
        finished = self._is_finished()
        evaluates_first = self._evaluator.is_due(self._progress, finished)
        trains_nothing = finished and not evaluates_first
        provenance = group.from_rank0(
            lambda: (trains_nothing and read_provenance(run.folder)) or record_start(run, world.size, num_hosts)
        )
        tracker = None
        if world.rank == 0:
            left = config.schedule.seconds_left(self._progress.seconds)
            times.open(run.folder, self._progress.step, stream.steps, left, finished)
            tracker = open_run_tracker(run, provenance, self._progress, stream, evaluates_first, times)
        self._reporter = Reporter(run, model.flops, engine, self._interval, times, nodes, tracker)
        clock = TrainingClock(self._progress.seconds)
        self._checkpointer = Checkpointer(
            run, engine, model.model, stream, group, self._interval, clock, times, provenance, self._reporter.alert
        )
        self._saves = self._checkpointer.saves
        self._recovery = Recovery(config.health)
        self._bad_batches = BadBatchWriter(run.folder, world, stream.corpora, run.tokenizer.decode)
        on_gpus = engine.device.type == "cuda" and world.size > 1
        sums = DeviceSums(engine.device, times.make_progress) if on_gpus else group
        agreement = StepAgreement(sums, world, clock, config.checkpoint.every_minutes, len(stream.corpora))
        hang_seconds = config.health.hang_seconds
        self._feed = BatchFeed(stream, engine.device, hang_seconds, self._saves, agreement, group, times)
        self._started: list[Tensor] = []  # losses of microbatches of the next batch
        self._profiler = StepProfiler(run.folder.profile) if config.run.profile and world.rank == 0 else None
        self._start_at(self._progress)

    def train(self, stop: StopRequest) -> Outcome:
        """Train to the end, or until a rank is asked to stop. Saves the last step.

        Raises AgreedFailureError, UnwritableError or DataWorkerError, each on all ranks, if the run cannot continue.
        """
        self._times.begin_training()
        if not self._evaluate_and_save_at_start(stop):
            return self._end_early(stop)
        previous = rate = 0.0
        while not self._is_finished():
            batch, totals = self._feed.take(stop)
            previous, rate = rate, self._learning_rate(batch.step, totals.seconds)
            trained = self._train_step(batch, totals.masked_tokens, rate)
            votes = self._feed.wait_for_votes()
            self._saves.advance_if_done(votes.ranks_done)
            if self._profiler is not None:
                self._profiler.step()
            if isinstance(trained, FaultyStep):
                rewound = self._respond(batch, trained)
                if rewound:
                    continue
                trained = SKIPPED
            self._count(totals, trained)
            if self._engine.world.size > 1 and self._progress.is_multiple_of(self._config.health.compare_every):
                compare_replicas(self._engine, self._group, batch, rate)

            finished = self._is_finished()
            stopping = votes.stop_requests > 0 and not finished
            if self._reporter.is_due(self._progress, finished):
                self._report(rate, trained.result.grad_norm)
            if not stopping:
                self._evaluate_if_due(stop)  # patience may end the run
                stopping = self._is_evaluation_due()  # abandoned
            self._checkpointer.save_if_due(self._progress, self._is_finished(), stopping, votes.save_requests > 0)
            if stopping:
                return self._end_early(stop)
        if should_stop_early(self._progress.evaluations, self._config.evaluation):
            log_early_stop(self._progress.evaluations)
        elif ends_early(self._config.schedule, self._config.optimizer.lr, previous):
            log.warning("a step, an evaluation or a pause outlasted the decay from a learning rate of %.2e", previous)
        return Outcome.DONE

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any. Collective."""
        self._saves.wait()

    def close(self, outcome: Outcome) -> None:
        """Finish uploads unless the run has failed, and close the trackers, see `Reporter.close`. Collective unless the
        run has failed."""
        if self._profiler is not None:
            self._profiler.close()
        self._times.end_training()
        if outcome is not Outcome.FAILED:
            self._checkpointer.close()
        self._reporter.close(outcome, self._progress.step, self._group)
        self._times.record()

    def _start_at(self, progress: TrainingProgress) -> None:
        """Train from this progress on."""
        self._progress = progress
        self._interval.restart(progress)
        self._feed.open(progress.step, [*self._engine.tensors(), *self._checkpointer.host_tensors])

    def _end_early(self, stop: StopRequest) -> Outcome:
        log.info("stopping after step %d: %s", self._progress.step, stop.reason or "on another rank")
        return Outcome.STOPPED

    def _evaluate_and_save_at_start(self, stop: StopRequest | None) -> bool:
        """Evaluate and save before the next step. A run that stops leaves its last evaluation to the next attempt.
        Returns False if the evaluation was abandoned, as in `_evaluate_if_due`."""
        evaluated = self._evaluate_if_due(stop)
        if self._is_evaluation_due():
            return False
        self._checkpointer.save_at_start(self._progress, self._is_finished(), evaluated)
        return True

    def _learning_rate(self, step: int, seconds: float) -> float:
        return learning_rate(self._config.schedule, self._config.optimizer.lr, step, self._stream.steps, seconds)

    def _train_step(self, batch: RankBatch, global_masked: int, rate: float) -> TrainedStep | FaultyStep:
        """Train on one global batch, if `_is_trained_on` it."""
        if not self._is_trained_on(batch, global_masked):
            return SKIPPED
        engine, norms = self._engine, self._progress.grad_norms
        scaler = engine.loss_scaler_state()
        if not self._started:
            engine.begin_step(batch.step, rate, self._stream.max_seq_length(batch.step))
        left = range(len(self._started), len(batch.microbatches))
        losses = torch.stack(self._started + [self._accumulate(batch, global_masked, number) for number in left])
        self._started = []
        # The norm of a mean over few tokens is large.
        is_small = self._stream.is_small_rest(batch.step)
        step = engine.step(math.inf if is_small else norm_limit(norms, self._config.health.spike_factor))
        if engine.runs_ahead:
            self._start_next()
        result = step.wait()
        if result.applied:
            return TrainedStep(result, losses)
        loss = losses.sum(dtype=torch.float64)
        dist.all_reduce(loss)
        mean_loss = read_numbers(loss) / global_masked
        fault = diagnose(batch.step + 1, mean_loss, result.grad_norm, norms, scaled=engine.loss_scale is not None)
        if fault is None:
            engine.check_loss_scale()
            return TrainedStep(result, losses, overflowed=True)
        engine.load_loss_scaler_state(scaler)  # which treats every gradient that is not finite as an overflow
        return FaultyStep(fault, losses)

    def _accumulate(self, batch: RankBatch, global_masked: int, number: int) -> Tensor:
        """Forward and backward of microbatch `number` of a batch. Returns its summed loss."""
        loss = self._engine.accumulate(batch.microbatches[number], global_masked, batch.step, number)
        self._times.make_progress()
        return loss

    def _start_next(self) -> None:
        """Queue the first microbatch of the next batch, so that the device has work while the host waits for the norm
        of this step. It is right if the update is skipped, too: the weights then stay as they are."""
        upcoming = self._feed.peek()
        if upcoming is None:
            return
        batch, totals = upcoming
        if totals.stop_requests or not self._is_trained_on(batch, totals.masked_tokens):
            return
        rate = self._learning_rate(batch.step, totals.seconds)
        self._engine.begin_step(batch.step, rate, self._stream.max_seq_length(batch.step))
        self._started = [self._accumulate(batch, totals.masked_tokens, 0)]

    def _is_trained_on(self, batch: RankBatch, global_masked: int) -> bool:
        """Return whether the batch has masked tokens and is not known to be bad."""
        return global_masked > 0 and batch.step + 1 not in self._progress.bad_steps

    def _respond(self, batch: RankBatch, step: FaultyStep) -> bool:
        """Respond to a bad batch as `health.policy` says: skip it, or rewind. Returns whether the run was rewound.
        Raises AgreedFailureError if it ends."""
        losses = step.losses.tolist()
        fault = step.fault.located(self._group.all_gather_objects((platform.node(), losses)))
        with self._times.during(CHECKPOINTING):
            dumped = self._bad_batches.dump_bad_batch(batch, losses, fault)
            self._saves.wait()  # it may be the one to go back to
        what, policy = f"{fault}\n  its batch: {dumped}", self._config.health.policy
        self._reporter.alert(Alert("bad_batch", f"{what}\n  policy: {policy}"))
        if policy == "stop":
            try:
                raise AgreedFailureError(f"{what}\n{self._save_before_fault()}")
            except UnwritableError:
                log.error("%s", what)
                raise
        bad_steps = (*self._progress.bad_steps, fault.step)
        self._recovery.check(what, bad_steps, self._saves.saved_step)
        self._progress = replace(self._progress, bad_steps=bad_steps)
        if policy == "skip":
            log.warning("%s\n  policy: skipping it", what)
            return False
        self._rewind()
        log.warning("%s\n  policy: rewound to step %d, to skip it", what, self._progress.step)
        return True

    def _save_before_fault(self) -> str:
        """Save the state before a bad batch unless it is broken; returns advice for the user."""
        (broken,) = self._group.all_reduce_sum([int(not self._engine.partitions.masters_are_finite())])
        if broken:
            return f"  the weights before it: not finite either, so not saved\n{ADVICE}"
        self._checkpointer.save_now(self._progress)
        return (
            "  the state before it: saved; the same command with --health.policy=skip resumes and skips the batch\n"
            f"  if more batches are bad, the weights have diverged\n{ADVICE}"
        )

    def _rewind(self) -> None:
        """Go back to the newest checkpoint. Bad steps stay known; events logged before are not logged again."""
        reached = self._progress
        with self._times.during(STARTING):
            self._feed.close()
            if self._started:
                self._engine.discard_gradients()
                self._started = []
            self._start_at(replace(self._checkpointer.load_newest(), bad_steps=reached.bad_steps))
        self._reporter.skip_until(reached.step)
        self._evaluate_and_save_at_start(stop=None)

    def _count(self, totals: StepTotals, trained: TrainedStep) -> None:
        """Add the step to the log interval and the progress."""
        self._interval.add(trained.losses, totals)
        progress, result = self._progress, trained.result
        by_corpus = dict(progress.tokens_by_corpus)
        for name, tokens in zip(self._stream.corpora, totals.corpus_tokens, strict=True):
            by_corpus[name] = by_corpus.get(name, 0) + tokens
        norms = append_norm(progress.grad_norms, result.grad_norm) if result.applied else progress.grad_norms
        unfreezes = progress.step + 1 == self._config.model.freeze_steps  # later norms cover more parameters
        self._progress = replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + totals.tokens,
            tokens_by_corpus=by_corpus,
            seconds=totals.seconds,
            skipped_steps=progress.skipped_steps + (not result.applied),
            overflows=progress.overflows + trained.overflowed,
            grad_norms=() if unfreezes else norms,
            evaluated=False,
        )
        self._times.finish_step(self._progress.step)

    def _report(self, rate: float, grad_norm: float) -> None:
        self._progress = self._reporter.report(self._progress, rate, grad_norm, self._saves.saved_step)

    def _is_evaluation_due(self) -> bool:
        return self._evaluator.is_due(self._progress, self._is_finished())

    def _evaluate_if_due(self, stop: StopRequest | None) -> bool:
        """Evaluate the model if it is due. Returns whether it was evaluated: not if a rank is asked to stop by `stop`
        meanwhile. Then the evaluation is still due."""
        if not self._is_evaluation_due():
            return False
        self._progress = progress = self._evaluator.evaluate(self._progress, self._reporter, stop)
        if self._is_finished() and self._interval.losses:  # patience ends the run between two log events
            last_norm = progress.grad_norms[-1] if progress.grad_norms else math.nan
            self._report(self._learning_rate(progress.step - 1, progress.seconds), last_norm)
        return progress.evaluated

    def _is_finished(self) -> bool:
        progress = self._progress
        if should_stop_early(progress.evaluations, self._config.evaluation):
            return True
        if self._stream.steps is not None:
            return progress.step >= self._stream.steps
        left = self._config.schedule.seconds_left(progress.seconds)
        return left is not None and left <= 0
