"""Evaluate a run on held-out text: when, which step is best, when to stop early, whether the model overfits."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat

from experiment.run_files.goodput import EVALUATING, ActivityTimer
from pretrain.batching.batch import Microbatch
from pretrain.batching.packing import MicrobatchLayout
from pretrain.config import EvaluationConfig
from pretrain.engine.engine import Engine
from pretrain.evaluate import HeldOutEvaluator, open_held_out
from pretrain.modeling.masked_lm import Predictions
from pretrain.resolve import ResolvedRun
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.log_interval import LogInterval
from pretrain.training.reporter import Reporter
from pretrain.training.stop_request import StopRequest
from pretrain.training_progress import EvaluationHistory, SummedLoss, TrainingProgress
from pretrain.world import World

log = logging.getLogger(__name__)

_VOTE_SECONDS = 2.0


def open_evaluator(run: ResolvedRun, layout: MicrobatchLayout, world: World) -> HeldOutEvaluator:
    """Return the evaluator of a run. It uses one sequence length in all stages, so that the figures are comparable, and
    batches as large as in training, so that it needs no more memory."""
    config, indexes = run.config, run.folder.path / "index"
    seed, sequences = config.run.seed, config.batch.sequences
    return open_held_out(run.held_out, run.vocabulary, config.masking, seed, layout, world, indexes, sequences)


@dataclass(frozen=True)
class RunEvaluator:
    """Evaluates a run every `evaluation.every_steps` steps, before its first step and after its last."""

    config: EvaluationConfig
    held_out: HeldOutEvaluator
    engine: Engine
    interval: LogInterval
    times: ActivityTimer
    group: CpuGroup
    first_step: int

    def is_due(self, progress: TrainingProgress, finished: bool) -> bool:
        """Return whether this step is to be evaluated, and has not been. A run that is asked to stop saves at once: the
        evaluation of that step is left to its next attempt."""
        is_chosen = progress.step == self.first_step or progress.is_multiple_of(self.config.every_steps)
        return (finished or is_chosen) and not progress.evaluated

    def evaluate(self, progress: TrainingProgress, reporter: Reporter, stop: StopRequest | None) -> TrainingProgress:
        """Evaluate the model, log the scores, and return the progress with them; or, if a rank is asked to stop by
        `stop` meanwhile, the progress as it was. Collective."""
        stops = repeat(False) if stop is None else stop_votes(self.group, stop)

        def predict(microbatch: Microbatch) -> Predictions:
            if next(stops):
                raise _StoppedError
            self.times.make_progress()
            return self.engine.predict(microbatch)

        with self.times.during(EVALUATING):
            try:
                metrics = self.held_out.metrics(predict, self.engine.device)
            except _StoppedError:
                return progress
            begins_fork = progress.step == self.first_step > 0
            if metrics or begins_fork:  # the tokens of a fork's parent, from which its own are counted
                reporter.log(progress, metrics)
            so_far = self.interval.include_in(progress)
            corpora = {name: corpus.fingerprint for name, corpus in self.held_out.corpora.items()}
            comparable = forget_replaced(progress.evaluations, corpora)
            history = update_history(comparable, self.config, progress.step, metrics, so_far.trained)
            for name in newly_overfitting(history, self.config):
                log.warning("step %d: %s", progress.step, describe_rise(name, comparable, history))
            return replace(so_far, evaluations=history, evaluated=True)


class _StoppedError(Exception):
    """An evaluation is abandoned, on all ranks at the same microbatch."""


def stop_votes(group: CpuGroup, stop: StopRequest) -> Iterator[bool]:
    """Yield before each microbatch of an evaluation whether a rank is asked to stop. Collective.

    The ranks vote about every two seconds, because a collective in each microbatch would make them wait for each other.
    All have equally many microbatches. The number until the next vote is doubled, or halved if a rank was late.
    """
    interval, before = 1, time.monotonic()
    while True:
        late = time.monotonic() - before > _VOTE_SECONDS
        requests, late_ranks = group.all_reduce_sum([int(stop.reason is not None), int(late)])
        interval, before = max(1, interval // 2) if late_ranks else 2 * interval, time.monotonic()
        yield requests > 0
        yield from repeat(False, interval - 1)


def log_early_stop(history: EvaluationHistory) -> None:
    found = "it was never finite"
    if history.best is not None:
        found = f"the best was {history.best:.4g} at step {history.best_step}"
    log.info("stopping early: %s has not improved for %d evaluations; %s", history.metric, history.waited, found)


def forget_replaced(history: EvaluationHistory, corpora: Mapping[str, str]) -> EvaluationHistory:
    """Return the history without scores on corpora that were replaced since. corpora: name -> fingerprint."""
    replaced = [name for name, fingerprint in corpora.items() if history.corpora.get(name, fingerprint) != fingerprint]
    for name in replaced:
        log.warning("corpus.eval.%s has other text than at the last evaluation: scores before are not compared", name)
    metric = history.metric
    if metric is not None and metric.removeprefix("eval/").rpartition("/")[0] in replaced:
        metric = None
    held_out = {name: loss for name, loss in history.held_out.items() if name not in replaced}
    return replace(history, metric=metric, held_out=held_out, corpora=dict(corpora))


def update_history(
    history: EvaluationHistory,
    config: EvaluationConfig,
    step: int,
    metrics: Mapping[str, float | int | None],
    trained: SummedLoss,
) -> EvaluationHistory:
    """Return the history after the evaluation of `step`.

    Args:
        metrics: as from `HeldOutEvaluator.metrics`.
        trained: up to this step.
    """
    best, best_step, waited = history.best, history.best_step, history.waited + 1
    if config.best_metric != history.metric:
        best, best_step, waited = None, None, 1
    value = None if config.best_metric is None else metrics.get(config.best_metric)
    higher_is_better = str(config.best_metric).endswith("/accuracy")
    if value is not None and (best is None or (value > best if higher_is_better else value < best)):
        best, best_step, waited = value, step, 0

    masked = trained.masked_tokens - history.trained.masked_tokens
    train_loss = (trained.loss - history.trained.loss) / masked if masked else None
    train_loss_fell = train_loss is not None and history.train_loss is not None and train_loss < history.train_loss
    held_out = {
        key.removeprefix("eval/").removesuffix("/loss"): float(loss)
        for key, loss in metrics.items()
        if key.endswith("/loss") and loss is not None
    }
    rising = {
        name: history.rising.get(name, 0) + 1
        for name, loss in held_out.items()
        if train_loss_fell and loss > history.held_out.get(name, loss)
    }
    return EvaluationHistory(
        metric=config.best_metric,
        best=best,
        best_step=best_step,
        waited=waited,
        trained=trained,
        train_loss=train_loss,
        held_out=held_out,
        corpora=history.corpora,
        rising=rising,
        step=step,
        metrics=dict(metrics),
    )


def should_stop_early(history: EvaluationHistory, config: EvaluationConfig) -> bool:
    """Return whether `patience` evaluations have passed without a new best."""
    return config.patience is not None and history.metric == config.best_metric and history.waited >= config.patience


def newly_overfitting(history: EvaluationHistory, config: EvaluationConfig) -> list[str]:
    """Return the corpora to warn about now: each once per streak."""
    return [name for name, times in history.rising.items() if times == config.overfitting_after]


def describe_rise(name: str, before: EvaluationHistory, now: EvaluationHistory) -> str:
    """Return the warning about a held-out loss that has risen: the model overfits, or, if the loss on another corpus
    fell in the last evaluation, forgets. before: the history without that evaluation."""
    rise = f"the loss on {name} has risen for {now.rising[name]} evaluations while"
    learned = [other for other, loss in now.held_out.items() if loss < before.held_out.get(other, loss)]
    if learned:
        advice = "mix such text into corpus.train or lower optimizer.lr, see docs/data_mixtures.md"
        return f"the model forgets {name}: {rise} that on {learned[0]} fell; {advice}"
    return f"overfitting: {rise} the training loss fell"
