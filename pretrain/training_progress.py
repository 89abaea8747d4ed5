"""Progress of a run: the content of a checkpoint besides tensors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from experiment.errors import UserError

# Names in state.json, kept so that existing checkpoints load.
_SAVED_AS = {"masked_tokens": "masked", "grad_norms": "norms", "bad_steps": "skipped", "evaluations": "standing"}


class SummedLoss(NamedTuple):
    loss: float = 0.0  # sum over their masked tokens
    masked_tokens: int = 0


@dataclass(frozen=True)
class EvaluationHistory:
    """The evaluations so far: which one is best, and whether the model overfits."""

    metric: str | None = None  # that `best`, `best_step` and `waited` are about
    best: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since the best one
    trained: SummedLoss = field(default_factory=SummedLoss)  # up to the last evaluation
    train_loss: float | None = None  # mean over the steps between the last two evaluations
    held_out: dict[str, float] = field(default_factory=dict)  # corpus -> loss at the last evaluation
    rising: dict[str, int] = field(default_factory=dict)  # corpus -> consecutive evaluations that suggest overfitting
    step: int | None = None  # of the last evaluation
    metrics: dict[str, float | int | None] = field(default_factory=dict)  # of the last evaluation, for model cards
    corpora: dict[str, str] = field(default_factory=dict)  # corpus -> its fingerprint at the last evaluation


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

    @property
    def trained(self) -> SummedLoss:
        """The loss of all steps; call it on the result of `LogInterval.include_in`."""
        return SummedLoss(self.loss_sum + sum(self.interval_losses), self.masked_tokens + self.interval_masked)

    @property
    def is_best_step(self) -> bool:
        return self.evaluations.best_step == self.step

    def is_multiple_of(self, steps: int | None) -> bool:
        """Return whether something that happens every `steps` steps, None: never, is due."""
        return steps is not None and self.step % steps == 0


def progress_to_json(progress: TrainingProgress) -> dict[str, Any]:
    return {_SAVED_AS.get(key, key): value for key, value in asdict(progress).items()}


def progress_from_json(saved: dict[str, Any]) -> TrainingProgress:
    """Return the progress that a checkpoint's state.json holds. Raises UserError for fields of a newer version."""
    names = {old: new for new, old in _SAVED_AS.items()}
    values: dict[str, Any] = {
        names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in saved.items()
    }
    evaluations = values["evaluations"]
    for kind, found in ((TrainingProgress, values), (EvaluationHistory, evaluations)):
        if unknown := found.keys() - {known.name for known in fields(kind)}:
            raise UserError(f"a newer version of deepcloze wrote its progress: unknown field '{min(unknown)}'")
    trained = SummedLoss(*evaluations["trained"])
    return TrainingProgress(**{**values, "evaluations": EvaluationHistory(**{**evaluations, "trained": trained})})


def fork_progress(parent: TrainingProgress, same_stream: bool) -> TrainingProgress:
    """Start a fork at its parent's step and tokens, with a clock, log interval and evaluations of its own.

    `same_stream`: each step has the same batch as in the parent, so its bad steps are skipped here too.
    """
    bad_steps = parent.bad_steps if same_stream else ()
    return TrainingProgress(parent.step, parent.tokens, parent.tokens_by_corpus, bad_steps=bad_steps)


def rename_corpora(
    tokens: Mapping[str, int], before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Return tokens by corpus under their present names: a folder may have been renamed, and the corpora of a fork may
    have the names of others. The name of a corpus that the run does not have gets its fingerprint.

    Args:
        tokens: by name before.
        before, now: `name` and `fingerprint` of the training corpora.
    """
    present: dict[str, list[str]] = {}  # beginning of the fingerprint -> names
    for corpus in now:
        present.setdefault(corpus["fingerprint"][:8], []).append(corpus["name"])
    known = {corpus["name"]: corpus["fingerprint"][:8] for corpus in before}
    renamed = Counter[str]()
    for name, count in tokens.items():
        plain, _, digits = (name, "", known[name]) if name in known else name.rpartition("@")
        names = present.get(digits, [f"{plain}@{digits}" if plain else name])
        renamed[name if name in names else names[0]] += count
    return dict(renamed)
