"""The config of a fine-tuning run, checked when it is built.

The string literal below each field documents it; docs/config.md is generated from them. `finetune/recipes/*.yaml` are
complete examples.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from experiment.config import Section
from experiment.config.constraints import Fraction, PathText, Seed, SequenceLength
from experiment.tracking.config import TrackingConfig

MetricName = Literal["accuracy", "macro_f1", "weighted_f1", "uar", "matthews"]


def _number_as_text(value: Any) -> Any:
    """Labels and column names are text, even if YAML reads `0` or `1` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _written_tab(value: Any) -> Any:
    """A tab, as typed on a command line."""
    return "\t" if value == r"\t" else value


Name = Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1)]
Separator = Annotated[str, BeforeValidator(_written_tab), Field(min_length=1, max_length=1)]


class RunConfig(Section):
    """The run folder."""

    dir: PathText
    """Run folder; see docs/finetuning.md for its contents."""


class ColumnsConfig(Section):
    """Names of the columns, or their numbers from 0 if `header` is null."""

    label: Name = "label"
    """Column with the label."""

    text: Name = "sentence1"
    """Column with the text."""

    text_pair: Name | None = None
    """Column with the second text, for tasks on pairs."""


class TaskConfig(Section):
    """The task and its data. See docs/finetuning.md."""

    name: str | None = None
    """Name of the task in results.json; default: the name of the config file."""

    kind: Literal["classification"] = "classification"
    """Kind of task: `classification` of single texts or pairs."""

    train: PathText
    """Training split: a .csv, .tsv, .txt (tab-separated) or .jsonl file, plain or .gz."""

    validation: PathText
    """Validation split, which decides which epoch is kept."""

    test: PathText | None = None
    """Test split, scored with the best epoch; predicted only, if it has no labels."""

    columns: ColumnsConfig = ColumnsConfig()

    labels: tuple[Name, ...] | None = None
    """Labels in the order of their ids; default: the labels of the training split, sorted."""

    metric: MetricName = "accuracy"
    """Metric that selects the best epoch. All metrics are reported."""

    sep: Separator | None = None
    """Column separator; default: a comma in .csv files, otherwise a tab."""

    quoting: Literal[0, 3] = 0
    """As in pandas: with 0, double quotes enclose a field; with 3, quotes are ordinary characters."""

    header: Literal[0] | None = 0
    """As in pandas: 0 takes column names from the first row; null: there is no header, and `columns` are numbers
    from 0."""

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
    """The encoder to fine-tune."""

    init_from: str
    """A Hugging Face folder, a pretraining run (its newest checkpoint), or a checkpoint of one."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` keeps the architecture and initializes the weights randomly, as a baseline."""

    max_seq_length: SequenceLength = 128
    """Maximum length of an example in tokens, special tokens included; longer examples are truncated."""


class TrainingConfig(Section):
    """Training of the classifier, once per seed."""

    lr: PositiveFloat = 2.0e-5
    """Peak learning rate of a linear warmup and decay."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; not applied to biases and norms."""

    epochs: PositiveInt = 3
    """Number of epochs."""

    batch_size: PositiveInt = 32
    """Examples per batch."""

    warmup_ratio: Fraction = 0.1
    """Fraction of all steps used for the warmup."""

    seeds: tuple[Seed, ...] = (42,)
    """Train once with each of these seeds."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights the loss of each label inversely to its frequency, for rare labels."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 if the device supports it natively, otherwise fp32. fp16 needs CUDA."""

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> Self:
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
