"""Predict with a fine-tuned model, for `deepcloze predict` and servers."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from experiment.errors import UserError
from finetune.data.records import Record, Table
from finetune.device import choose_device
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Padding, encode_split
from finetune.encoding.tokenizer import load_task_tokenizer
from finetune.model import ModelSpec, build_model, read_model_inputs
from finetune.results.calibration import calibrate
from finetune.saved_task import SavedTask, read_saved_task
from finetune.task_kind import Prediction, TaskKind
from finetune.training.evaluation import Inference, decode
from finetune.training.microbatch import Microbatch

_UNLIMITED = 512  # tokens of a sequence, if neither the folder nor the model limits them


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model, ready to predict. Threads may share it."""

    folder: Path
    kind: TaskKind[Any]
    temperature: float | None  # of calibrated probabilities, see `finetune.results.calibration`
    _encoder: Encoder
    _inference: Inference
    # A tokenizer of the tokenizers library cannot change its truncation while another thread uses it.
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls,
        folder: Path,
        precision: str = "auto",
        batch_size: int = 128,
        task: SavedTask | None = None,
    ) -> Self:
        """Load a model folder.

        precision: as in the training config. batch_size: sequences that are computed at once. task: default: the one
        that is saved in the folder. Raises UserError for a folder that is not usable.
        """
        task = task or read_saved_task(folder)
        device = choose_device(precision)
        tokenizer = load_task_tokenizer(folder, task.kind.config)
        spec = ModelSpec(folder, True, task.kind.auto_model, task.kind.head)
        inputs = read_model_inputs(spec, tokenizer)
        built = build_model(spec)
        if built.new:
            raise UserError(f"{folder}: the model is not fine-tuned: its weights lack {', '.join(built.new[:3])}")
        length = task.max_seq_length or min(inputs.max_length or _UNLIMITED, tokenizer.model_max_length)
        encoder = Encoder(tokenizer, length, inputs.token_types, task.kind.config.special_tokens_in_text)
        model = built.model.to(device.device)
        inference = Inference(model, task.kind, Padding.of(tokenizer), device, Microbatch(batch_size))
        return cls(folder, task.kind, task.temperature, encoder, inference)

    def predict(self, records: Sequence[Mapping[str, Any]], calibrated: bool = False) -> list[Prediction]:
        """The predictions for records, in order. A record maps the roles of columns, such as `text`, to values.

        Raises UserError for a record that lacks a role or has an unknown one, and if there is no temperature.
        """
        checked = [Record(f"record {number}", self._check(number, values)) for number, values in enumerate(records, 1)]
        return self.predict_records(checked, calibrated)

    def predict_records(self, records: Sequence[Record], calibrated: bool = False) -> list[Prediction]:
        """As `predict`, for records that were read from a file."""
        if calibrated and self.temperature is None:
            raise UserError(f"{self.folder}: the model has no temperature, so its probabilities cannot be calibrated")
        with self._encoding:
            split = encode_split(Table(self.folder, tuple(records), labelled=False), self.kind, self._encoder, False)
        outputs, _ = self._inference.compute(split.examples)
        predictions = decode(self.kind, split, outputs)
        if not calibrated or self.temperature is None:
            return list(predictions)
        return [calibrate(prediction, self.temperature) for prediction in predictions]

    def _check(self, number: int, values: Mapping[str, Any]) -> Mapping[str, Any]:
        roles = self.kind.config.columns.without_targets().cell_types()
        if set(values) != set(roles):
            raise UserError(f"record {number}: expected {', '.join(roles)}; found {', '.join(values) or 'nothing'}")
        return values
