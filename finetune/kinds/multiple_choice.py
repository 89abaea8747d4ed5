"""Multiple choice: which of several choices answers a question or continues a text."""

import string
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiment.errors import UserError
from finetune.data.columns import ChoiceColumn, ChoicesColumn, Columns, ContextColumn, TextColumn
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import Batch, Example
from finetune.scores.calibration import Classified, list_probabilities, pad_probabilities
from finetune.scores.significance import Interval, accuracy_interval
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind, predictor_usage

Choices = list[str] | dict[str, str]
"""Texts, or texts by name."""


class MultipleChoiceColumns(Columns):
    """Columns of a multiple-choice task."""

    label: ChoiceColumn = "label"
    """Column with the right choice: its number from 0 or from 1, its letter, or its text. All rows use the same of
    these; `task.labels` names the first, second, … choice if it is not clear which."""

    choices: ChoicesColumn = "choices"
    """Column with a list of choices, in CSV as JSON; or a list of columns with one choice each. A list may have names
    that `label` uses: `{"label": ["A", "B"], "text": […, …]}`."""

    question: TextColumn | None = "question"
    """Column with the question; null if there is none."""

    context: ContextColumn | None = None
    """Column with the text that the question is about, or that the choices continue."""

    @model_validator(mode="after")
    def _there_is_a_text(self) -> Self:
        if self.question is None and self.context is None:
            raise ValueError("question: without a context there must be a question")
        return self


class Config(TaskConfig):
    """Which of several choices answers a question or continues a text."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    columns: MultipleChoiceColumns = MultipleChoiceColumns()
    metric: Literal["accuracy"] = "accuracy"

    truncation_side: Literal["right", "left"] = "right"
    """Where a context is cut if it is too long: at its end (right) or at its beginning (left). Question and choice are
    kept."""


class Kind(TaskKind[Config]):
    """A prediction has `label`, as the file has it, and `probabilities`: by label, or a list in the order of the
    choices if their texts are the labels."""

    config_type = Config
    auto_model = "AutoModelForMultipleChoice"
    hub_task = "multiple-choice"

    @property
    def usage(self) -> str:
        record = {"context": "A text.", "question": "Which one is right?", "choices": ["This one.", "That one."]}
        roles = self.config.columns.without_targets().cell_types()
        return predictor_usage({role: value for role, value in record.items() if role in roles})

    @classmethod
    def find_labels(cls, config: Config, train: Table) -> tuple[str, ...]:
        """Return the names of the first, second, … choice in the file; () if labels are the texts of the choices, or if
        each row has names for them."""
        if isinstance(train.records[0].values["choices"], dict):
            return ()
        most = max(len(record.values["choices"]) for record in train.records)
        numbers = [str(number) for number in range(most + 1)]
        fitting = [
            (),
            tuple(numbers[:-1]),
            tuple(numbers[1:]),
            tuple(string.ascii_uppercase[:most]),
            tuple(string.ascii_lowercase[:most]),
        ]
        for record in train.records:
            choices, label = _names_in_row(record.values["choices"]), record.values["label"]
            fitting = [names for names in fitting if label in (names[: len(choices)] if names else choices)]
            if not fitting:
                raise UserError(
                    f"{record.place}: the label '{label}' is not the number, letter or text of a choice; all rows must "
                    "use the same one of these"
                )
        if len(fitting) > 1:
            raise UserError(
                f"{train.path}: the labels are {' or '.join(map(_describe_names, fitting))} of the choices; set "
                "task.labels to what the file calls the first, second, … choice"
            )
        return fitting[0]

    @property
    def head(self) -> dict[str, Any]:
        return {}

    def check_target(self, record: Record) -> None:
        self._choice_id(record)

    def count_options(self, record: Record) -> int:
        return len(record.values["choices"])

    def check_input(self, record: Record) -> None:
        if len(record.values["choices"]) < 2:
            raise UserError(f"{record.place}: expected two or more choices, found {record.values['choices']}")
        self._names(record.values["choices"], record.place)

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        self.check_input(record)
        texts = [record.values[role] for role in ("context", "question") if role in record.values]
        first, room, choices = encoder.ids(texts[0]), encoder.room(2), record.values["choices"]
        choices = choices.values() if isinstance(choices, dict) else choices
        seconds = [encoder.ids(" ".join([*texts[1:], choice])) for choice in choices]
        sequences = tuple(self._sequence(first, second, room, encoder) for second in seconds)
        return [Example(sequences, self._choice_id(record) if "label" in record.values else None)]

    def _sequence(self, first: list[int], second: list[int], room: int, encoder: Encoder) -> Tokens:
        kept = max(room - len(second), 0)
        start = max(len(first) - kept, 0) if self.config.truncation_side == "left" else 0
        cut = max(len(first) + len(second) - room, 0)
        return encoder.assemble(first[start : start + kept], second[-room:], cut=cut)

    def _choice_id(self, record: Record) -> int:
        label, choices = record.values["label"], record.values["choices"]
        if (names := self._names(choices, record.place)).count(label) != 1:
            problem = "is not a choice" if label not in names else "is the text of several choices"
            raise UserError(f"{record.place}: the label '{label}' {problem}; the choices: {', '.join(names)}")
        return names.index(label)

    def _names(self, choices: Choices, place: str) -> list[str]:
        """Return the names of the choices of a row in the file."""
        if self.labels and len(choices) > len(self.labels):
            raise UserError(f"{place}: {len(choices)} choices, but only {len(self.labels)} labels: {self.labels}")
        return list(self.labels[: len(choices)]) or _names_in_row(choices)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return S1 scores."""
        # All sequences of a batch as the choices of one question: questions may differ in their number of choices.
        logits: Tensor = model(**{name: tensor[None] for name, tensor in batch.inputs.items()}).logits
        return logits.reshape(-1, 1)

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        assert batch.targets is not None
        sizes = [len(example.sequences) for example in batch.examples]
        return choice_loss(torch.split(outputs[:, 0].float(), sizes), batch.targets)

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        probabilities = torch.softmax(torch.from_numpy(np.concatenate(outputs)), dim=0).tolist()
        names = self._names(record.values["choices"], record.place)
        best = names[best_choices(probabilities)[0]]
        if not self.labels:
            return {"label": best, "probabilities": probabilities}
        # All labels, also in a row of fewer choices: the rows of a file have the same columns.
        by_label = {**dict.fromkeys(self.labels, 0.0), **dict(zip(names, probabilities, strict=True))}
        return {"label": best, "probabilities": by_label}

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        is_correct = np.array(_is_correct(records, predictions))
        return lambda rows: {"accuracy": float(is_correct[rows].mean())}

    def is_collapsed(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> bool:
        """Return whether no row has a best choice, or all rows have the same label although the right ones differ."""
        is_tied = [has_tie(list_probabilities(prediction)) for prediction in predictions]
        return all(is_tied) or super().is_collapsed(records, predictions)

    def classified(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Classified:
        targets = np.array([self._choice_id(record) for record in records])
        return Classified(targets, pad_probabilities(predictions), np.array(_is_correct(records, predictions)))

    def intervals(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> dict[str, Interval]:
        """Questions about one context are not independent."""
        contexts = [record.values.get("context", "").strip() or record.place for record in records]
        return {"accuracy": accuracy_interval(_is_correct(records, predictions), contexts)}


def choice_loss(scores: Sequence[Tensor], targets: Tensor) -> Loss:
    """Return the cross-entropy over the choices of each question. scores: of these. targets: the right indices."""
    padded = pad_sequence(list(scores), batch_first=True, padding_value=float("-inf"))
    losses = F.cross_entropy(padded, targets, reduction="none")
    return Loss.of(losses.sum(), len(losses))


def best_choices(probabilities: Sequence[float]) -> list[int]:
    """Return the indices of the most probable choices, up to rounding: scores of the same tokens differ by their place
    in a batch. If there are several, the first is predicted, but none counts as right: a collapsed model, whose choices
    are all equal, would be right wherever the first one is."""
    lower = max(probabilities) - 1e-6
    return [index for index, each in enumerate(probabilities) if not each <= lower]  # NaN, too: it is reported later


def has_tie(probabilities: Sequence[float]) -> bool:
    return len(best_choices(probabilities)) > 1


def _is_correct(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[bool]:
    return [
        record.values["label"] == prediction["label"] and not has_tie(list_probabilities(prediction))
        for record, prediction in zip(records, predictions, strict=True)
    ]


def _names_in_row(choices: Choices) -> list[str]:
    """Return the names of choices, or their texts as labels are read, without the space around them."""
    return [name.strip() for name in choices]


def _describe_names(names: tuple[str, ...]) -> str:
    return f"'{names[0]}', '{names[1]}', …" if len(names) > 1 else "the texts"
