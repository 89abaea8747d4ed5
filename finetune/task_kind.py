"""The declaration of a kind of task. Each file in finetune/kinds defines one, as a class called `Kind`.

From its declaration follow reading, tokenizing, training, scoring, the predictions file, `deepcloze predict` and the
reference of its config keys. To add a kind, add a file.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from experiment.config import did_you_mean
from experiment.errors import UserError
from experiment.formatting import shorten
from experiment.process.fast_imports import fast_imports
from finetune import kinds
from finetune.data.columns import TextColumns
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.scores.calibration import Classified, list_probabilities, scale
from finetune.scores.metrics import LabelScores, is_constant, label_scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.encoding.encoder import Encoder, TextOrPair
    from finetune.encoding.examples import Batch, Example
    from finetune.pooling import Pooling

_SHOWN_LABELS = 30  # on one line
_LONGEST_LIST = 250  # characters, of labels in a message

# Shape suffixes: S sequences of a batch, T tokens of the longest of them, C labels.

Prediction = Mapping[str, Any]
"""A prediction for a record: the answer and perhaps probabilities, as in JSON."""

Scorer = Callable[[NDArray[np.int64]], dict[str, float]]
"""Numbers of records, in which one may occur several times -> all metrics of their predictions."""

ConfigT = TypeVar("ConfigT", bound=TaskConfig)


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss of a task, from the training config."""

    label_weights: "Tensor | None" = None  # as from `TaskKind.label_weights`; 1 on average over the training split
    label_smoothing: float = 0.0  # see `TaskKind.smooths_labels`


@dataclass(frozen=True)
class Loss:
    """Loss of a batch: `sum` over its parts, and the weight of these, so that sum / weight is their mean.

    Sums and weights of several batches add up to the loss of all of them. `weight` does not depend on label weights:
    dividing by it gives every label its share of the loss in the long run, however few examples a batch has.
    """

    sum: "Tensor"
    weight: "Tensor"

    @classmethod
    def of(cls, total: "Tensor", count: int) -> Self:
        """Return the loss of `count` parts of the same weight. total: the sum of their losses."""
        return cls(total, total.new_tensor(float(count)))


class TaskKind(ABC, Generic[ConfigT]):
    """One kind of task.

    A record becomes examples, each of one or more sequences; training draws examples. The outputs of all sequences of a
    record are decoded together.
    """

    config_type: ClassVar[type[TaskConfig]]
    """The `task` section: `columns`, `metric` with all metrics and the primary one as default, and the options of the
    kind."""

    lower_is_better: ClassVar[tuple[str, ...]] = ()
    """The metrics of which lower values are better."""

    answer: ClassVar[str] = "label"
    """Key of a prediction that holds the answer."""

    smooths_labels: ClassVar[bool] = False
    """Whether `loss` uses `LossOptions.label_smoothing`."""

    weights_labels: ClassVar[bool] = False
    """Whether `loss` uses `LossOptions.label_weights`, for `training.class_weights: balanced`."""

    compares_examples: ClassVar[bool] = False
    """Whether the loss of an example depends on the others of its update, which are then drawn at random, not by
    length, and computed with gradient caching if they take several microbatches."""

    auto_model: str = "AutoModelForSequenceClassification"
    """The class of transformers that has the head for this kind."""

    hub_task: ClassVar[str] = "text-classification"
    """The name of the kind on the Hugging Face Hub."""

    library: ClassVar[str] = "transformers"
    """The library that opens the model, as the Hub calls it."""

    def __init__(self, config: ConfigT, labels: tuple[str, ...]) -> None:
        """labels: as in the config, or as `find_labels` gives them, in the order of their ids."""
        self.config = config
        self.labels = labels

    @classmethod
    def metrics(cls) -> tuple[str, ...]:
        """Return all metrics."""
        return get_args(cls.config_type.model_fields["metric"].annotation)

    @classmethod
    def find_labels(cls, config: ConfigT, train: Table) -> tuple[str, ...]:
        """Return the labels of a task whose config names none, in the order of their ids; () if it has none. Raises
        UserError if there is only one."""
        return ()

    @property
    def head(self) -> dict[str, Any]:
        """Settings for the config of transformers: the size of the head and the names of its outputs, the labels. Empty
        without labels."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self.label_ids),
        }

    @cached_property
    def label_ids(self) -> Mapping[str, int]:
        """Label -> id."""
        return {label: number for number, label in enumerate(self.labels)}

    def label_id(self, label: str, place: str) -> int:
        """Return the id of a label. place: file and line. Raises UserError for an unknown label."""
        if label not in self.label_ids:
            advice = "" if self.config.labels else " (the model has those of its training split, or of task.labels)"
            close = shorten(did_you_mean(label, self.labels), _LONGEST_LIST)
            raise UserError(f"{place}: unknown label '{label}'{advice}{close}")
        return self.label_ids[label]

    def target_range(self, train: Table) -> tuple[float, float] | None:
        """Return the mean and the standard deviation of targets that are numbers."""
        return None

    def describe(self, train: Table) -> list[str]:
        """Return lines about the training split, for the user."""
        return []

    def describe_shares(self, counts: Counter[str], total: int) -> str:
        """Return the share of each label, or of the most frequent ones if there are many. counts: of `total`."""
        few = len(self.labels) <= _SHOWN_LABELS
        shown = self.labels if few else sorted(self.labels, key=lambda label: -counts[label])[:_SHOWN_LABELS]
        return ", ".join(f"{label} {counts[label] / total:.1%}" for label in shown) + ("" if few else ", …")

    @property
    def embedding(self) -> "tuple[Pooling, bool]":
        """The pooling of `POST /v1/embed`, and whether it scales vectors to length 1."""
        return "mean", False

    @property
    def usage(self) -> str:
        """Python that predicts for a text, for the model card. A `string.Template`: $model is the line that sets
        `model`, $tokenizing are arguments that cut or pad a text as in training, $length is the maximum length, and
        $overlap the tokens that windows over a longer text share."""
        is_pair = "text_pair" in self.config.columns.cell_types()
        text = '{"text": "A text.", "text_pair": "Another text."}' if is_pair else '"A text."'
        return (
            "from transformers import pipeline\n\n$model\n"
            f'classifier = pipeline("text-classification", model=model, $tokenizing)\n'
            f"print(classifier({text}))"
        )

    @abstractmethod
    def expand(self, record: Record, encoder: "Encoder", training: bool) -> list["Example"]:
        """Return the examples of a record, without targets if it has none. Raises UserError for an invalid target."""

    def encoded_texts(self, record: Record) -> Sequence["TextOrPair"]:
        """Return texts and pairs that `expand` encodes: those of many records are encoded together, which is faster."""
        return [TextColumns.texts(record.values)] if isinstance(self.config.columns, TextColumns) else []

    def evaluated_texts(self, record: Record) -> Iterator[str]:
        """Yield the texts of a record that pretraining text must not have, if it is evaluated on: all that the model
        reads."""
        for role, cell_type in self.config.columns.cell_types().items():
            if cell_type.read_by_model and role in record.values:
                value = record.values[role]
                yield from [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value

    def check_input(self, record: Record) -> None:
        """Raise UserError for a record that cannot be predicted, as `expand` does, but early: without a tokenizer."""

    def check_target(self, record: Record) -> None:
        """Raise UserError for an invalid target, as `expand` does, but early: without a tokenizer."""

    def target(self, record: Record, roles: Sequence[str]) -> object:
        """Return the target of a record. Targets that mean the same are equal. roles: of its parts."""
        return [record.values.get(role) for role in roles]

    def count_options(self, record: Record) -> int:
        """Return how many texts of a record are scored one by one, such as choices; 0 if there are none."""
        return 0

    def count_option_tokens(self, records: Sequence[Record], encoder: "Encoder") -> int:
        """Return a lower bound of the tokens of `expand`, if they grow with the square of options' lengths; else 0."""
        return 0

    def probe(self, encoder: "Encoder") -> "Example":
        """Return a small example without targets, to try a model."""
        from finetune.encoding.examples import Example

        return Example((encoder.encode("a"),) * 2)

    def targets(self, examples: Sequence["Example"]) -> "Tensor":
        """Return the targets of a batch."""
        import torch

        return torch.tensor([example.target for example in examples])

    def label_weights(self, examples: Sequence["Example"]) -> tuple[float, ...]:
        """Return the weights of labels for `loss`, if `weights_labels`."""
        raise NotImplementedError

    def forward(self, model: "nn.Module", batch: "Batch") -> "Tensor":
        """Return the outputs of a model; the first dimension is S."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

    @abstractmethod
    def loss(self, outputs: "Tensor", batch: "Batch", options: LossOptions) -> Loss:
        """Return the loss of a batch that has targets. outputs: as from `forward`."""

    @abstractmethod
    def decode(
        self, record: Record, examples: Sequence["Example"], outputs: Sequence[NDArray[np.float32]]
    ) -> Prediction:
        """Return the prediction for a record. outputs: one for each sequence of its examples, in order."""

    def relate(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Sequence[Prediction]:
        """Return the predictions for all records of a split with targets, as they are scored and kept: with values that
        depend on the other records, such as ranks."""
        return predictions

    @abstractmethod
    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        """Return the function that scores predictions for records with targets.

        A bootstrap calls it a thousand times, so it compares predictions with targets before: it only adds up numbers.
        """

    def scores(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return all metrics of predictions for records with targets."""
        return self.scorer(records, predictions)(np.arange(len(records)))

    def is_collapsed(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> bool:
        """Return whether a model predicts the same for all records although their targets differ, see `is_constant`."""
        targets = [record.values[role] for role in self.config.columns.target_roles() for record in records]
        return is_constant([prediction[self.answer] for prediction in predictions], targets)

    def intervals(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> Mapping[str, tuple[float, float]]:
        """Return the 95 % confidence intervals of those metrics that have one, see `significance.accuracy_interval`."""
        return {}

    def breakdowns(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Further tables of scores: name -> rows, written as `NAME-<split>.csv`."""
        return {}

    def rows(self, record: Record, prediction: Prediction) -> Sequence[tuple[Mapping[str, Any], Prediction]]:
        """Return the rows of the predictions file: usually one row with the values of the record and its prediction."""
        return [(record.values, prediction)]

    def classified(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Classified | None:
        """Return labels and probabilities of all decisions about records with targets; None if the kind has no
        probability for each label."""
        return None

    def calibrate(self, prediction: Prediction, temperature: float) -> Prediction:
        """Return a prediction with calibrated probabilities, for kinds that have `classified`."""
        probabilities = prediction["probabilities"]
        scaled = scale(np.array(list_probabilities(prediction)), temperature).tolist()
        named = dict(zip(probabilities, scaled, strict=True)) if isinstance(probabilities, Mapping) else scaled
        return {**prediction, "probabilities": named}

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64] | None:
        """Return the loss of the prediction for each row of records with targets; None if the kind does not say."""
        classified = self.classified(records, predictions)
        return None if classified is None else classified.losses

    def label_pairs(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return the ids of N labels, and of the predicted ones; None if nothing has one label of several."""
        return None

    def label_scores(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> LabelScores:
        """Return the scores of each label; empty if the kind has no labels."""
        pairs = self.label_pairs(records, predictions)
        return {} if pairs is None else label_scores(*pairs, self.labels)

    def library_files(self, model: "PreTrainedModel", max_seq_length: int) -> Mapping[str, Any]:
        """Return the JSON files that `library` needs in the model folder: path -> content."""
        return {}


def predictor_usage(record: Mapping[str, Any]) -> str:
    """Return the `usage` of a kind that transformers has no pipeline for."""
    return (
        "import deepcloze\n\n$model\npredictor = deepcloze.Predictor.load(model)\n"
        f"print(predictor.predict([{json.dumps(record)}]))"
    )


def find_kind(name: str) -> type[TaskKind[Any]]:
    """Return the kind of this name, one of `kinds.kind_names`."""
    with fast_imports():
        kind: type[TaskKind[Any]] = importlib.import_module(f"{kinds.__name__}.{name}").Kind
    return kind
