"""How far a run has come: what a checkpoint holds besides tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.training.early_stopping import EvaluationHistory, history_from_json

# Names in state.json, kept so that existing checkpoints load.
_SAVED_AS = {"masked_tokens": "masked", "grad_norms": "norms", "bad_steps": "skipped", "evaluations": "standing"}


@dataclass(frozen=True)
class TrainingProgress:
    """Saved with every checkpoint; the same on all ranks."""

    step: int = 0  # finished steps
    tokens: int = 0  # real tokens so far, special tokens included
    tokens_by_corpus: dict[str, int] = field(default_factory=dict)  # name -> real tokens
    seconds: float = 0.0  # of training, over all attempts, by rank 0's clock
    interval_losses: tuple[float, ...] = ()  # summed loss of each step since the last log event
    interval_masked: int = 0  # masked tokens in these steps
    skipped_steps: int = 0  # finished steps that updated nothing
    overflows: int = 0  # of these, the steps whose gradient overflowed fp16
    loss_sum: float = 0.0  # summed loss of all steps up to the last log event
    masked_tokens: int = 0  # in these steps
    grad_norms: tuple[float, ...] = ()  # of recent updates
    bad_steps: tuple[int, ...] = ()  # steps whose batch is bad: consumed without an update
    evaluations: EvaluationHistory = field(default_factory=EvaluationHistory)
    evaluated: bool = False  # the evaluation of this step, if one is due, is done


def progress_to_json(progress: TrainingProgress) -> dict[str, Any]:
    return {_SAVED_AS.get(key, key): value for key, value in asdict(progress).items()}


def progress_from_json(saved: dict[str, Any]) -> TrainingProgress:
    """The progress that a checkpoint's state.json holds."""
    names = {old: new for new, old in _SAVED_AS.items()}
    fields: dict[str, Any] = {
        names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in saved.items()
    }
    return TrainingProgress(**{**fields, "evaluations": history_from_json(fields["evaluations"])})


def fork_progress(parent: TrainingProgress, same_stream: bool) -> TrainingProgress:
    """Where a fork starts: at its parent's step and tokens, with a clock, log interval and evaluations of its own.

    `same_stream`: each step has the same batch as in the parent, so its bad steps are skipped here too.
    """
    return TrainingProgress(
        step=parent.step,
        tokens=parent.tokens,
        tokens_by_corpus=parent.tokens_by_corpus,
        bad_steps=parent.bad_steps if same_stream else (),
    )
