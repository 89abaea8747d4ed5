"""How far a run has come: what a checkpoint says of it besides its tensors."""

from dataclasses import dataclass, field
from typing import Any

from pretrain.training.early_stopping import EvaluationHistory, standing_of


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Saved with every checkpoint; the same on all ranks."""

    step: int = 0  # finished steps
    tokens: int = 0  # real tokens so far, special ones included
    tokens_by_corpus: dict[str, int] = field(default_factory=dict)  # of each corpus that was trained on
    seconds: float = 0.0  # spent training, over all attempts, by rank 0's clock
    interval_losses: tuple[float, ...] = ()  # summed loss of each step since the last log event
    interval_masked: int = 0  # predicted tokens in them
    skipped_steps: int = 0  # finished steps that updated nothing
    overflows: int = 0  # of those, because a gradient overflowed fp16
    loss_sum: float = 0.0  # summed loss of all steps up to the last log event
    masked: int = 0  # predicted tokens in them
    norms: tuple[float, ...] = ()  # gradient norms of the recent updates
    skipped: tuple[int, ...] = ()  # bad steps, which consume their batch and update nothing
    standing: EvaluationHistory = field(default_factory=EvaluationHistory)  # what the evaluations so far say
    evaluated: bool = False  # whether this step's evaluation, if one is due, is done


def fork_of(progress: Progress, same_stream: bool) -> Progress:
    """Where a fork of a run begins: at its step and tokens. The clock, the log interval and evaluations are its own; a
    batch that the run knew as bad is passed over as long as the stream is the same."""
    return Progress(
        step=progress.step,
        tokens=progress.tokens,
        tokens_by_corpus=progress.tokens_by_corpus,
        skipped=progress.skipped if same_stream else (),
    )


def progress_of(state: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's state.json holds."""
    saved: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in state["progress"].items()
    }
    return Progress(**{**saved, "standing": standing_of(saved["standing"])})
