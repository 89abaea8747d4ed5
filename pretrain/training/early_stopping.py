"""What the evaluations along a run say: which step is the best, when to stop early, whether the model overfits.

Pure functions of one evaluation after the other; what they need to know of the past is saved with the run's progress.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.config import EvaluationConfig

Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class EvaluationHistory:
    """After the evaluations so far."""

    metric: str | None = None  # that the next three are about
    best: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since then
    trained: tuple[float, int] = (0.0, 0)  # summed training loss and predicted tokens, up to the last evaluation
    train_loss: float | None = None  # mean over the steps between the last two evaluations
    held_out: dict[str, float] = field(default_factory=dict)  # corpus -> loss at the last evaluation
    rising: dict[str, int] = field(default_factory=dict)  # evaluations in a row that look like overfitting


def judge(
    standing: EvaluationHistory, config: EvaluationConfig, step: int, metrics: Metrics, trained: tuple[float, int]
) -> EvaluationHistory:
    """The standing after the evaluation of `step`. `trained`: see EvaluationHistory, up to this step."""
    best, best_step, waited = standing.best, standing.best_step, standing.waited + 1
    if config.best_metric != standing.metric:
        best, best_step, waited = None, None, 1
    found = None if config.best_metric is None else metrics.get(config.best_metric)
    if found is not None and (best is None or _better(config.best_metric, found, best)):
        best, best_step, waited = found, step, 0

    masked = trained[1] - standing.trained[1]
    train_loss = (trained[0] - standing.trained[0]) / masked if masked else None
    learning = train_loss is not None and standing.train_loss is not None and train_loss < standing.train_loss
    held_out = {
        key.removeprefix("eval/").removesuffix("/loss"): float(loss)
        for key, loss in metrics.items()
        if key.startswith("eval/") and key.endswith("/loss") and loss is not None
    }
    rising = {
        name: standing.rising.get(name, 0) + 1
        for name, loss in held_out.items()
        if learning and loss > standing.held_out.get(name, loss)
    }
    return EvaluationHistory(config.best_metric, best, best_step, waited, trained, train_loss, held_out, rising)


def out_of_patience(standing: EvaluationHistory, config: EvaluationConfig) -> bool:
    """Whether the run ends here, since it gets no better."""
    return config.patience is not None and standing.metric == config.best_metric and standing.waited >= config.patience


def overfitted(standing: EvaluationHistory, config: EvaluationConfig) -> list[str]:
    """The corpora to be warned about now: once in each streak."""
    return [name for name, times in standing.rising.items() if times == config.overfitting_after]


def standing_of(saved: Mapping[str, Any]) -> EvaluationHistory:
    """From its JSON."""
    loss, masked = saved["trained"]
    return EvaluationHistory(**{**saved, "trained": (loss, masked)})


def _better(metric: str | None, value: float, than: float) -> bool:
    return value > than if str(metric).endswith("/accuracy") else value < than
