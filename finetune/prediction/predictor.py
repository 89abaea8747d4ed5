"""Predict with a fine-tuned model, for `deepcloze predict` and servers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from experiment.config.field_types import expand_home
from experiment.errors import UserError
from experiment.models.model_names import local_model
from experiment.process.own_process import devices_restored
from finetune.data.columns import TEXT
from finetune.data.records import Record, Table, read_value
from finetune.device import MicrobatchSize
from finetune.encoding.examples import Example, Split
from finetune.inference import Inference, Outputs, compute_together, decode, without_padding
from finetune.prediction.loaded_model import LoadedModel, load_model
from finetune.prediction.saved_task import SavedTask, find_model, read_saved_task
from finetune.prepared_task import encode_split
from finetune.task_kind import Prediction, TaskKind


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model, ready to predict. Threads may share it."""

    kind: TaskKind[Any]
    temperature: float | None  # of calibrated probabilities, see `finetune.scores.calibration`
    loaded: LoadedModel
    accepts_pairs: bool  # beside single texts, see `SavedTask`
    _inference: Inference

    @classmethod
    @devices_restored()
    def load(
        cls, model: str | Path, precision: str = "auto", batch_size: int = 128, task: SavedTask | None = None
    ) -> Self:
        """Load a model folder, the best model of a fine-tuning run, or a model of the Hub by its name.

        precision: as in the training config. batch_size: examples that are computed at once. task: of a model folder;
        default: the one that is saved there. Raises UserError for a model that is not usable.

        Example:
            predictor = deepcloze.Predictor.load("runs/my-task")
            (prediction,) = predictor.predict([{"text": "A great film."}])
        """
        if batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, found {batch_size}")
        model = expand_home(str(model))
        folder = Path(model) if task else find_model(local_model(model, onnx=True))[0]
        task = task or read_saved_task(folder)
        return cls.of(load_model(folder, task, precision), task, batch_size)

    @classmethod
    def of(cls, loaded: LoadedModel, task: SavedTask, batch_size: int = 128) -> Self:
        """Predict with a model that is loaded already, and has the head of the task."""
        inference = Inference(loaded.model, task.kind, loaded.padding, loaded.device, MicrobatchSize(batch_size))
        return cls(task.kind, task.temperature, loaded, task.accepts_pairs, inference)

    @property
    def folder(self) -> Path:
        return self.loaded.folder

    def __repr__(self) -> str:
        return f"Predictor({str(self.folder)!r}, {self.kind.config.kind})"

    def predict(self, records: Sequence[Mapping[str, Any]], calibrated: bool = False) -> list[Prediction]:
        """Return the predictions for records, in order. A record maps the roles of columns, such as `text`, to values.

        Raises UserError for a record that lacks a role, has an unknown one or another type of value, and if there is no
        temperature.
        """
        if isinstance(records, str | Mapping):
            raise UserError(f"expected a list of records, found one: [{records!r}]")
        checked = [self.record(f"record {number}", values) for number, values in enumerate(records, 1)]
        return self.predict_split(self.encode(checked), calibrated)

    def predict_split(self, split: Split, calibrated: bool = False) -> list[Prediction]:
        """Like `predict`, for a split of `encode`."""
        check_calibrated(calibrated, self.temperature)
        return self.decode(split, self._inference.compute(split.examples)[0], calibrated)

    def encode(self, records: Sequence[Record]) -> Split:
        """Return the first step of `predict`. Raises UserError for a record that cannot be encoded."""
        table = Table(self.folder, tuple(records), labelled=False)
        with self.loaded.tokenizer_lock:
            return encode_split(table, self.kind, self.loaded.encoder, training=False)

    def count_option_tokens(self, records: Sequence[Record]) -> int:
        """See `TaskKind`. Takes less than `encode`."""
        with self.loaded.tokenizer_lock:
            return self.kind.count_option_tokens(records, self.loaded.encoder)

    def compute(self, examples: Sequence[Example]) -> Outputs:
        """Return the second step: the outputs of any examples, also of several calls of `encode`.

        They are computed together, whatever the batch size. Raises the error of torch if memory runs out.
        """
        return compute_together(examples, self.loaded.padding, lambda batch: self._inference.compute_batch(batch)[0])

    def decode(self, split: Split, outputs: Outputs, calibrated: bool = False) -> list[Prediction]:
        """Return the last step. outputs: of the examples of the split. Raises NotFiniteError."""
        self.loaded.check_finite(without_padding(split.examples, outputs))
        predictions = decode(self.kind, split, outputs)
        if not calibrated or self.temperature is None:
            return list(predictions)
        return [self.kind.calibrate(prediction, self.temperature) for prediction in predictions]

    def record(self, place: str, values: Mapping[str, Any]) -> Record:
        """Return a record of values by role. place: its name in messages. Raises UserError as `predict`."""
        roles = self.kind.config.columns.without_targets().cell_types()
        if not isinstance(values, Mapping):
            raise UserError(f"{place}: expected a mapping of {', '.join(roles)} to values, found {values!r}")
        if self.accepts_pairs and "text_pair" in values:
            roles["text_pair"] = TEXT
        if set(values) != set(roles):
            raise UserError(f"{place}: expected {', '.join(roles)}; found {', '.join(map(str, values)) or 'nothing'}")
        return Record(place, {role: read_value(values[role], roles[role], place, role) for role in roles})


def check_calibrated(calibrated: bool, temperature: float | None) -> None:
    """Raise UserError if calibrated probabilities are asked for, and there is no temperature."""
    if calibrated and temperature is None:
        raise UserError(
            "calibrated: the model has no temperature, so its probabilities cannot be calibrated; one is fitted on the "
            "validation split, for kinds whose predictions have a probability of each label"
        )
