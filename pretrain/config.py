"""The config of a pretraining run. Every value is checked when the config is built.

Each field's comment says what it means; `pretrain/recipes/*.yaml` are whole runs written in it.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from experiment.config import Section, nearest
from experiment.tracking.config import TrackingConfig

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class RunConfig(Section):
    dir: str  # the run folder
    seed: NotNegative = 42  # of initialisation, data order, masks and dropout
    log_every: Positive = 10  # steps between log events
    resume: str = (
        "auto"  # auto: continue what the folder holds | never: it must be unused | a run or checkpoint to fork
    )

    @property
    def parent(self) -> str | None:
        """The run or checkpoint of another run that this one is a fork of."""
        return None if self.resume in ("auto", "never") else self.resume


class ModelConfig(Section):
    config: dict[str, Any] | None = None  # a transformers config: {model_type: bert, hidden_size: 256, …}
    init_from: str | None = None  # whose weights training begins with: a Hugging Face folder, a checkpoint or a run
    freeze: tuple[str, ...] = ()  # modules that stay as they are at first: embeddings, layer.0, …
    freeze_steps: NotNegative = 0  # for so many steps
    added_tokens: str | None = None  # init_from's tokenizer with words added (`deepcloze tokenizer --extend`)
    max_positions: Positive | None = None  # a longest sequence beyond what init_from was made for
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of the averaged weights; null: none are kept
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.config is None and self.init_from is None:
            raise ValueError("needs either 'config' (a new model) or 'init_from' (a Hugging Face folder)")
        if self.config is not None and self.init_from is None and "model_type" not in self.config:
            raise ValueError("'config' needs 'model_type', such as bert, roberta or modernbert")
        for key in ("added_tokens", "max_positions"):
            if getattr(self, key) is not None and self.init_from is None:
                raise ValueError(f"'{key}' changes the model in 'init_from', which is not given")
        if bool(self.freeze) != bool(self.freeze_steps):
            raise ValueError("'freeze' (what) and 'freeze_steps' (how long) need each other")
        return self


class WeightedCorpus(Section):
    path: str  # a folder made by `deepcloze corpus`
    weight: Annotated[float, Field(gt=0.0)] = 1.0  # its share of the tokens seen, relative to the others' weights


class CorpusConfig(Section):
    train: str | tuple[WeightedCorpus, ...]  # a folder made by `deepcloze corpus`, or a mixture of several
    eval: dict[str, str] = {}  # name -> corpus folder, for the held-out figures

    @field_validator("train")
    @classmethod
    def _not_empty(cls, train: str | tuple[WeightedCorpus, ...]) -> str | tuple[WeightedCorpus, ...]:
        if not train:
            raise ValueError("names no corpus")
        return train


class BatchConfig(Section):
    sequences: Positive = 256  # sequences in a global batch
    max_seq_length: Annotated[int, Field(ge=8)] = 128  # tokens in a sequence, its special tokens included
    microbatch_tokens: Positive = 8192  # token slots that one rank computes at once

    @model_validator(mode="after")
    def _one_sequence_fits(self) -> Self:
        if self.microbatch_tokens < self.max_seq_length:
            raise ValueError(
                f"microbatch_tokens ({self.microbatch_tokens}) must hold one sequence of "
                f"max_seq_length ({self.max_seq_length})"
            )
        return self


class MaskingConfig(Section):
    """Dynamic masking as BERT (Devlin et al. 2019) defines it, drawn afresh in each epoch."""

    unit: Literal["token", "word", "span"] = "token"  # what is chosen at once
    rate: Rate | tuple[Rate, ...] = 0.15  # share of the text tokens that are predicted; several: see schedule
    schedule: Literal["constant", "linear", "stepped"] = "constant"  # how a run passes through several rates
    mask_share: Fraction = 0.8  # of the predicted tokens, those shown as [MASK]
    random_share: Fraction = 0.1  # those shown as another, random token; the rest is shown as it is

    @property
    def rates(self) -> tuple[float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        if (self.schedule == "constant") != (len(self.rates) == 1):
            raise ValueError(
                f"the schedule '{self.schedule}' needs "
                + ("a single rate" if self.schedule == "constant" else "at least two rates, such as [0.3, 0.15]")
            )
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "lamb", "stableadamw"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = 5.0e-4  # at the peak of the schedule
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01  # not applied to biases and norms
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-6
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0  # largest global gradient norm; 0: no clipping
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # a layer's rate over the next one's


class StageConfig(Section):
    """A part of a run with its own sequence length. What is left out is as in `batch`."""

    steps: Positive | None = None  # how long; the last stage may leave it out and takes the rest of the run
    max_seq_length: Annotated[int, Field(ge=8)] | None = None
    sequences: Positive | None = None
    microbatch_tokens: Positive | None = None


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "wsd"] = "linear"
    warmup_steps: NotNegative = 100  # from 0 up to lr
    steps: Positive | None = None  # how long to train: one of steps, epochs, tokens and budget
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    tokens: Annotated[float, Field(gt=0.0)] | None = None  # real ones, special tokens included
    budget: str | None = None  # time spent training, over all attempts: 30m, 24h, 1d12h
    min_lr_ratio: Fraction = 0.0  # the learning rate does not fall below lr times this
    decay_steps: Positive | None = None  # of wsd: how long the final decay takes; null: a tenth of the run
    power: Annotated[float, Field(gt=0.0)] = 2.0  # of polynomial
    batch_warmup_steps: NotNegative = 0  # over which the global batch grows to batch.sequences
    stages: tuple[StageConfig, ...] = ()  # of different sequence lengths, one after the other

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget is None else _seconds(self.budget)

    @property
    def known_steps(self) -> int | None:
        """The length of the run, where the config says it in steps."""
        if self.steps is None and self.stages and self.stages[-1].steps is not None:
            return sum(stage.steps or 0 for stage in self.stages)
        return self.steps

    @field_validator("budget")
    @classmethod
    def _readable(cls, budget: str | None) -> str | None:
        if budget is not None:
            _seconds(budget)
        return budget

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = [key for key in ("steps", "epochs", "tokens", "budget") if getattr(self, key) is not None]
        if len(lengths) > 1 or not (lengths or self.stages):
            raise ValueError(
                "needs exactly one of 'steps', 'epochs', 'tokens' and 'budget'"
                + (f", found {' and '.join(map(repr, lengths))}" if lengths else "")
            )
        if self.decay_steps is not None and (self.name != "wsd" or self.budget is not None):
            raise ValueError("'decay_steps' belongs to the schedule 'wsd' with a length in steps, epochs or tokens")
        if self.name == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("'inverse_sqrt' is lr * sqrt(warmup_steps / step), so 'warmup_steps' must not be 0")
        if self.stages:
            self._check_stages()
        if self.decay_steps is not None and self.known_steps is not None and self.decay_steps > self.known_steps:
            raise ValueError(f"'decay_steps' is {self.decay_steps}, longer than the run of {self.known_steps} steps")
        return self

    def _check_stages(self) -> None:
        if self.epochs is not None:
            raise ValueError("'stages' cut the corpus anew, so the length of the run cannot be given in 'epochs'")
        *others, last = self.stages
        if any(stage.steps is None for stage in others):
            raise ValueError("'stages': only the last one may leave out 'steps'")
        total = sum(stage.steps or 0 for stage in self.stages)
        if last.steps is None:
            if self.steps is None and self.tokens is None and self.budget is None:
                raise ValueError("'stages': the last one leaves out 'steps', so the run needs a length")
            if self.steps is not None and total >= self.steps:
                raise ValueError(f"'stages' take {total} steps, which leaves none of {self.steps} for the last one")
        elif self.steps not in (None, total) or self.tokens is not None or self.budget is not None:
            raise ValueError(f"'stages' take {total} steps, which is not the length of the run; leave out the last's")


class EvaluationConfig(Section):
    every_steps: Positive = 500  # also before the first step and after the last
    best_metric: str | None = None  # as in metrics.jsonl, eval/NAME/loss: the best checkpoint by it is kept
    patience: Positive | None = None  # evaluations without a better best_metric after which the run ends
    overfitting_after: Positive = 3  # evaluations in which held-out loss rose while training loss fell: then a warning

    @model_validator(mode="after")
    def _patience_with_what(self) -> Self:
        if self.patience is not None and self.best_metric is None:
            raise ValueError("'patience' needs 'best_metric', such as eval/NAME/loss for a corpus of corpus.eval")
        return self


class CheckpointConfig(Section):
    every_steps: Positive | None = 100
    every_minutes: Annotated[float, Field(gt=0.0)] | None = None  # by rank 0's clock, besides every_steps
    keep_last: Positive = 3  # the newest ones kept
    keep_every: Positive | None = None  # multiples of this step are kept as well


class HealthConfig(Section):
    """What is done about a loss or gradient that is not a number, or a gradient that jumps."""

    policy: Literal["stop", "skip", "rewind"] = "stop"  # rewind: back to the last checkpoint, then past the bad batch
    spike_factor: Annotated[float, Field(gt=1.0)] = 10.0  # times the recent gradient norms' median
    compare_every: Positive | None = 100  # steps between comparisons of what all ranks must have in common; null: never
    hang_seconds: Positive = 600  # that a rank waits for the others before it takes them for dead


class Stage(NamedTuple):
    """A stage with nothing left out."""

    first_step: int
    max_seq_length: int
    sequences: int
    microbatch_tokens: int


class EngineConfig(Section):
    ds_config: str = "ds_configs/bf16_zero1.json"  # precision, ZeRO stage, offload, communication


class PretrainConfig(Section):
    """One pretraining run."""

    run: RunConfig
    model: ModelConfig
    corpus: CorpusConfig
    batch: BatchConfig = BatchConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run: a single one where the config names none."""
        resolved, first_step = [], 0
        for stage in self.schedule.stages or (StageConfig(),):
            resolved.append(
                Stage(
                    first_step,
                    stage.max_seq_length or self.batch.max_seq_length,
                    stage.sequences or self.batch.sequences,
                    stage.microbatch_tokens or self.batch.microbatch_tokens,
                )
            )
            first_step += stage.steps or 0
        return tuple(resolved)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for number, stage in enumerate(self.stages):
            if stage.microbatch_tokens < stage.max_seq_length:
                raise ValueError(
                    f"'schedule.stages': microbatch_tokens ({stage.microbatch_tokens}) of number {number + 1} must "
                    f"hold one sequence of its max_seq_length ({stage.max_seq_length})"
                )
        if self.schedule.epochs is not None and not isinstance(self.corpus.train, str):
            raise ValueError("'schedule.epochs': the corpora of a mixture each have their own; give steps or tokens")
        if self.schedule.budget is not None and self.masking.schedule != "constant":
            raise ValueError("'masking.schedule': with a time budget nobody knows how many steps there will be")
        metric = self.evaluation.best_metric
        known = [f"eval/{name}/{kind}" for name in self.corpus.eval for kind in ("loss", "perplexity", "accuracy")]
        if metric is not None and metric not in known:
            raise ValueError(
                f"'evaluation.best_metric': nothing is evaluated under the name '{metric}'"
                + (nearest(metric, known) if known else "; corpus.eval is empty")
            )
        return self


def _seconds(text: str) -> float:
    """The seconds of a duration such as 90s, 30m, 24h or 1d12h. Raises ValueError."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if seconds <= 0 or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"'{text}' is no duration such as 90s, 30m, 24h or 1d12h")
    return seconds
