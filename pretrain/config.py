"""The config of a pretraining run. Every value is checked when the config is built.

Each field's comment says what it means; `pretrain/recipes/*.yaml` are whole runs written in it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from experiment.configuration import Section
from experiment.tracking.config import TrackingConfig

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class RunConfig(Section):
    dir: str  # the run folder
    seed: NotNegative = 42  # of initialisation, data order, masks and dropout
    log_every: Positive = 10  # steps between log events
    resume: Literal["auto", "never"] = "auto"  # auto: continue what the folder holds | never: the folder must be unused


class ModelConfig(Section):
    config: dict[str, Any] | None = None  # a transformers config: {model_type: bert, hidden_size: 256, …}
    init_from: str | None = None  # a Hugging Face folder whose weights training begins with

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.config is None and self.init_from is None:
            raise ValueError("needs either 'config' (a new model) or 'init_from' (a Hugging Face folder)")
        if self.config is not None and self.init_from is None and "model_type" not in self.config:
            raise ValueError("'config' needs 'model_type', such as bert, roberta or modernbert")
        return self


class CorpusConfig(Section):
    train: str  # a folder made by `deepcloze corpus`
    eval: dict[str, str] = {}  # name -> corpus folder, for the held-out figures


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

    unit: Literal["token"] = "token"  # what is chosen at once
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # share of the text tokens that are predicted
    mask_share: Fraction = 0.8  # of the predicted tokens, those shown as [MASK]
    random_share: Fraction = 0.1  # those shown as another, random token; the rest is shown as it is

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = 5.0e-4  # at the peak of the schedule
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01  # not applied to biases and norms
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-6
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0  # largest global gradient norm; 0: no clipping


class ScheduleConfig(Section):
    name: Literal["linear"] = "linear"  # warm up from 0 to lr, then down in a straight line
    warmup_steps: NotNegative = 100
    steps: Positive | None = None  # how long to train: exactly one of steps and epochs
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    min_lr_ratio: Fraction = 0.0  # the schedule ends at lr times this

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of 'steps' and 'epochs'")
        return self


class EvaluationConfig(Section):
    every_steps: Positive = 500  # also before the first step and after the last


class CheckpointConfig(Section):
    every_steps: Positive | None = 100
    every_minutes: Annotated[float, Field(gt=0.0)] | None = None  # by rank 0's clock, besides every_steps
    keep_last: Positive = 3  # the newest ones kept
    keep_every: Positive | None = None  # multiples of this step are kept as well


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
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()
