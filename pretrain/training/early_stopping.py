"""The history of a run's evaluations: which step is best, when to stop early, whether the model overfits.

Pure functions of one evaluation after the other. The history is saved with the run's progress.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.config import EvaluationConfig

EvaluationMetrics = Mapping[str, float | int | None]
"""Flat: eval/<corpus>/{loss,perplexity,accuracy}; None where not finite."""


@dataclass(frozen=True)
class EvaluationHistory:
    """What is kept of the evaluations so far."""

    metric: str | None = None  # that `best`, `best_step` and `waited` are about
    best: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since the best one
    trained: tuple[float, int] = (0.0, 0)  # summed training loss and masked tokens up to the last evaluation
    train_loss: float | None = None  # mean over the steps between the last two evaluations
    held_out: dict[str, float] = field(default_factory=dict)  # corpus -> loss at the last evaluation
    rising: dict[str, int] = field(default_factory=dict)  # corpus -> consecutive evaluations that suggest overfitting
    step: int | None = None  # of the last evaluation
    metrics: dict[str, float | int | None] = field(default_factory=dict)  # of the last evaluation, for model cards


def update_history(
    history: EvaluationHistory,
    config: EvaluationConfig,
    step: int,
    metrics: EvaluationMetrics,
    trained: tuple[float, int],
) -> EvaluationHistory:
    """The history after the evaluation of `step`. `trained`: summed training loss and masked tokens up to this step."""
    best, best_step, waited = history.best, history.best_step, history.waited + 1
    if config.best_metric != history.metric:
        best, best_step, waited = None, None, 1
    value = None if config.best_metric is None else metrics.get(config.best_metric)
    if value is not None and (best is None or _is_better(config.best_metric, value, best)):
        best, best_step, waited = value, step, 0

    masked = trained[1] - history.trained[1]
    train_loss = (trained[0] - history.trained[0]) / masked if masked else None
    train_loss_fell = train_loss is not None and history.train_loss is not None and train_loss < history.train_loss
    held_out = {
        key.removeprefix("eval/").removesuffix("/loss"): float(loss)
        for key, loss in metrics.items()
        if key.startswith("eval/") and key.endswith("/loss") and loss is not None
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
        rising=rising,
        step=step,
        metrics=dict(metrics),
    )


def should_stop_early(history: EvaluationHistory, config: EvaluationConfig) -> bool:
    """Whether `patience` evaluations have passed without a new best."""
    return config.patience is not None and history.metric == config.best_metric and history.waited >= config.patience


def newly_overfitting(history: EvaluationHistory, config: EvaluationConfig) -> list[str]:
    """The corpora to warn about now: each once per streak."""
    return [name for name, times in history.rising.items() if times == config.overfitting_after]


def history_from_json(saved: Mapping[str, Any]) -> EvaluationHistory:
    loss, masked = saved["trained"]
    return EvaluationHistory(**{**saved, "trained": (loss, masked)})


def _is_better(metric: str | None, value: float, than: float) -> bool:
    return value > than if str(metric).endswith("/accuracy") else value < than
