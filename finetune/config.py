"""The config of a fine-tuning run, checked when it is built.

The keys of `task` depend on its kind: `FinetuneConfig` has the shared ones, and `load_config` builds one of
its variants. The string literal below each field documents it; docs/config.md is generated from them.
`finetune/recipes/*.yaml` are complete examples.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, create_model, model_validator

from experiment.config import Section, did_you_mean, flatten, with_defaults
from experiment.config.field_types import Count, Fraction, LocalPath, PathText, Seed, SequenceLength
from experiment.errors import UserError
from experiment.tracking.config import TrackingConfig
from finetune.data.task_config import TaskConfig
from finetune.kinds import kind_names
from finetune.task_kind import find_kind

CHANGE_ROUNDING_ONLY = ("microbatch_size", "eval_batch_size", "parallel_seeds")
"""Keys of `training` that change results only by rounding and by other dropout masks."""

PATHS = re.compile(r"task\.(train|validation|test(\..*)?)|model\.init_from")
"""Keys of paths, whose contents are recorded beside them."""

_HIGH_LR = 0.01  # even for small models


class RunConfig(Section):
    """The run folder."""

    dir: LocalPath
    """Run folder; see docs/finetuning.md for its contents."""

    keep: Literal["best", "all", "none"] = "best"
    """Models to keep: `best` saves the best one of each seed, `all` also the models of its other evaluations, in
    RUN/seed-N/evaluations; `none` saves predictions and scores only."""


class ModelConfig(Section):
    """The encoder to fine-tune."""

    init_from: PathText
    """A Hugging Face folder, a pretraining run (its newest checkpoint), or a checkpoint of one; the URL of a
    checkpoint or mirror; or NAME[@REVISION] of a model on the Hugging Face Hub. See docs/object_storage.md and
    docs/hub.md."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` keeps the architecture and initializes the weights randomly, as a baseline."""

    pooling: Literal["default", "mean", "cls"] = "default"
    """What a head for sequence classification or multiple choice reads: the mean over the hidden states of all tokens,
    or the hidden state of the first one, such as [CLS]. `default`: as the config of the model says. Only models with
    `classifier_pooling`, such as ModernBERT, have a choice; embeddings have `task.pooling`."""

    max_seq_length: SequenceLength = 128
    """Maximum length of a sequence in tokens, special tokens included; longer ones are truncated."""

    config: dict[str, Any] = {}
    """Fields of the model's config to change, such as {hidden_dropout_prob: 0.1}: a model that was pretrained without
    dropout is also fine-tuned without it. See docs/finetuning.md."""

    freeze: tuple[str, ...] = ()
    """Modules that are not trained: one or more whole, consecutive parts of parameter names, such as embeddings,
    layer.0 or encoder."""


class TrainingConfig(Section):
    """Training of the model, once per seed."""

    lr: PositiveFloat = 2.0e-5
    """Peak learning rate of a linear warmup and decay."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; not applied to biases and norms."""

    adam_eps: PositiveFloat = 1.0e-8
    """Added to the denominator of AdamW's update for numerical stability."""

    grad_clip: NonNegativeFloat = 1.0
    """Maximum norm of the gradient; 0 disables clipping."""

    epochs: PositiveInt = 3
    """Number of epochs."""

    steps: PositiveInt | None = None
    """Number of updates, in place of `epochs`; null: as many as the epochs have."""

    batch_size: Count = 32
    """Examples per update."""

    microbatch_size: PositiveInt | None = None
    """Examples that are computed at once; their gradients are accumulated over the update. null: `batch_size`. It is
    halved when memory runs out."""

    eval_batch_size: PositiveInt | None = None
    """Examples that are computed at once in evaluations; null: four times as many as in training. It is halved when
    memory runs out."""

    warmup_ratio: Fraction = 0.1
    """Fraction of all steps used for the warmup."""

    warmup_steps: NonNegativeInt | None = None
    """Steps of the warmup, in place of `warmup_ratio`."""

    evaluate_every: Literal["epoch"] | PositiveInt = "epoch"
    """Updates between evaluations of the validation split, or `epoch`. The last update is always followed by one."""

    score_train: bool = False
    """Score the training split too at each evaluation, to see overfitting."""

    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better score. null: no early stopping."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target that is spread evenly over all labels (Szegedy et al. 2016), for kinds with one label."""

    fit_on: Literal["train", "train+validation"] = "train"
    """Splits to train on. With `train+validation` no split is left to choose the best weights by: the last are kept."""

    seeds: tuple[Seed, ...] = (42,)
    """Train once with each of these seeds. Without training, as zero-shot, only the first one is used."""

    parallel_seeds: PositiveInt = 1
    """Seeds to train at a time, each in a process of its own: on a GPU of its own, or on a share of the CPU's cores."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights the loss of each label inversely to its frequency, for rare labels."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 if the device supports it natively, otherwise fp32. fp16 needs CUDA. Outputs of heads are fp32."""

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield settings that are probably mistakes. steps: updates of each seed; 0 if nothing is trained."""
        if self.lr > _HIGH_LR:
            yield f"training.lr is {self.lr:g}: usual learning rates are 1e-5 to 1e-3, see docs/finetuning.md"
        if self.warmup_steps is not None and 0 < steps <= self.warmup_steps:
            yield f"training.warmup_steps is {self.warmup_steps:,}, but each seed has only {steps:,} steps"

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if self.patience is not None and self.fit_on != "train":
            raise ValueError(f"patience: needs a validation split, which fit_on: {self.fit_on} leaves none of")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: needs one or more, each once; found {list(self.seeds)}")
        return self


class FinetuneConfig(Section):
    """One fine-tuning run: one task, one or more seeds."""

    run: RunConfig
    task: TaskConfig
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @classmethod
    def specialize(cls, tree: Mapping[str, Any]) -> type[Self]:
        """Return the type with the keys of the task's kind. Raises UserError for an unknown kind."""
        if not isinstance(task := tree.get("task"), dict):
            return cls  # which rejects it
        kind = task.get("kind", TaskConfig.model_fields["kind"].default)
        if kind not in kind_names():
            raise UserError(f"'task.kind': unknown kind '{kind}'{did_you_mean(str(kind), kind_names())}")
        return config_of_kind(kind)  # type: ignore[return-value]

    @classmethod
    def variants(cls) -> Mapping[str, type[Self]]:
        return {f"kind: {kind}": config_of_kind(kind) for kind in kind_names()}  # type: ignore[misc]


@cache
def config_of_kind(kind: str) -> type[FinetuneConfig]:
    """Return the config of a run whose task is of this kind."""
    return create_model("FinetuneConfig", __base__=FinetuneConfig, task=(find_kind(kind).config_type, ...))


def changed_settings(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (recorded value, value now), of the settings of a seed that differ.

    A key that an earlier version did not have had its default. Paths of data and models are not compared: `data` and
    `encoder` have checksums of their contents.
    """
    config_type = FinetuneConfig.specialize(now)
    old, new = with_defaults(flatten(recorded), config_type), with_defaults(flatten(now), config_type)
    keys = sorted(key for key in {*old, *new} if not PATHS.fullmatch(key))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_validation(config: FinetuneConfig, use: str) -> None:
    """Raise UserError unless there is a validation split that is not trained on. use: the reason for it."""
    task = config.task
    if config.training.fit_on != "train":
        raise UserError(f"training.fit_on: expected train, found {config.training.fit_on}: {use}")
    if task.validation is None and not (task.train and task.is_trained):
        raise UserError(f"task.validation is missing: {use}")
