"""The config of a fine-tuning run. Every value is checked when the config is built.

Each field's comment says what it means; `finetune/recipes/*.yaml` are whole runs written in it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from experiment.config import Section
from experiment.tracking.config import TrackingConfig

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
MetricName = Literal["accuracy", "macro_f1", "weighted_f1", "uar", "matthews"]


def _number_as_text(value: Any) -> Any:
    """Labels and column names are text, also where YAML reads `0` or `1` as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _written_tab(value: Any) -> Any:
    """A tab as one types it on a command line."""
    return "\t" if value == r"\t" else value


Name = Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1)]
Separator = Annotated[str, BeforeValidator(_written_tab), Field(min_length=1, max_length=1)]


class RunConfig(Section):
    dir: str  # the run folder


class ColumnsConfig(Section):
    """Which column holds what: its name, or its number from 0 where `header` is null."""

    label: Name = "label"
    text: Name = "sentence1"
    text_pair: Name | None = None  # the second sentence, where the task is about pairs


class TaskConfig(Section):
    name: str | None = None  # how results.json calls the task; default: the name of the config file
    kind: Literal["classification"] = "classification"
    train: str  # .csv, .tsv, .txt (tab-separated) or .jsonl, each also as .gz
    validation: str  # decides which epoch is kept
    test: str | None = None  # scored at that epoch; without labels it is only predicted
    columns: ColumnsConfig = ColumnsConfig()
    labels: tuple[Name, ...] | None = None  # in the order of their ids; default: those of train, sorted
    metric: MetricName = "accuracy"  # what 'best' means
    sep: Separator | None = None  # default: a comma in .csv, else a tab
    quoting: Literal[0, 3] = 0  # as pandas has it: 0: "…" quotes a field; 3: a quote is a character like any other
    header: Literal[0] | None = 0  # as pandas has it: 0: the first row names the columns; null: no names

    @model_validator(mode="after")
    def _columns_are_numbers_without_header(self) -> Self:
        if self.header is None:
            for role, column in self.columns.model_dump().items():
                if column is not None and not column.isdecimal():
                    raise ValueError(
                        f"columns.{role}: without a header it must be a column number from 0, found '{column}'"
                    )
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if self.labels is not None:
            if len(self.labels) < 2:
                raise ValueError(f"labels: needs two or more, found {list(self.labels)}")
            if twice := sorted({label for label in self.labels if self.labels.count(label) > 1}):
                raise ValueError(f"labels: named twice: {', '.join(twice)}")
        return self


class ModelConfig(Section):
    init_from: str  # a Hugging Face folder, a checkpoint of a pretraining run, or such a run (its newest checkpoint)
    weights: Literal["pretrained", "random"] = "pretrained"  # random: the same architecture, nothing learned
    max_seq_length: Annotated[int, Field(ge=8)] = 128  # tokens of one example, special tokens included; longer: cut


class TrainingConfig(Section):
    lr: Annotated[float, Field(gt=0.0)] = 2.0e-5  # at the peak of a linear warmup and decay
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01  # not applied to biases and norms
    epochs: Positive = 3
    batch_size: Positive = 32  # examples
    warmup_ratio: Fraction = 0.1  # share of all steps
    seeds: tuple[NotNegative, ...] = (42,)  # one training each
    class_weights: Literal["none", "balanced"] = "none"  # balanced: a label's loss weighs inversely to its frequency
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, else fp32

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: needs one or more, each once; found {list(self.seeds)}")
        return self


class FinetuneConfig(Section):
    """One task, one or more seeds."""

    run: RunConfig
    task: TaskConfig
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()
