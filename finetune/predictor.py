"""Predict with a fine-tuned model, for `deepcloze predict` and servers."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from experiment.errors import UserError
from finetune.data.records import Record, Table, read_value
from finetune.device import Device, choose_device
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch, Padding, collate, encode_split
from finetune.encoding.tokenizer import load_task_tokenizer
from finetune.model import ModelSpec, build_model, read_model_inputs
from finetune.saved_task import SavedTask, read_saved_task
from finetune.task_kind import Prediction, TaskKind
from finetune.training.compatibility import computes
from finetune.training.evaluation import Inference, decode
from finetune.training.fast_linear import use_fast_linear
from finetune.training.microbatch import Microbatch

log = logging.getLogger(__name__)

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

        precision: as in the training config. batch_size: examples that are computed at once. task: default: the one
        that is saved in the folder. Raises UserError for a folder that is not usable.
        """
        task = task or read_saved_task(folder)
        device = choose_device(precision, key="--precision")
        tokenizer = load_task_tokenizer(folder, task.kind.config)
        spec = ModelSpec(folder, True, task.kind.auto_model, task.kind.head)
        inputs = read_model_inputs(spec, tokenizer)
        built = build_model(spec)
        if built.new:
            raise UserError(f"{folder}: the model is not fine-tuned: its weights lack {', '.join(built.new[:3])}")
        length = task.max_seq_length or min(inputs.max_length or _UNLIMITED, tokenizer.model_max_length)
        encoder = Encoder(tokenizer, length, inputs.token_types, task.kind.config.special_tokens_in_text)
        padding = replace(Padding.of(tokenizer), length=length if task.padded else None)
        model = built.model.to(device.device).eval()
        use_fast_linear(model)
        probe = collate(task.kind, [task.kind.probe(encoder)], padding, device.device)
        device = _usable_precision(model, task.kind, probe, device)
        inference = Inference(model, task.kind, padding, device, Microbatch(batch_size))
        return cls(folder, task.kind, task.temperature, encoder, inference)

    def predict(self, records: Sequence[Mapping[str, Any]], calibrated: bool = False) -> list[Prediction]:
        """The predictions for records, in order. A record maps the roles of columns, such as `text`, to values.

        Raises UserError for a record that lacks a role, has an unknown one or another type of value, and if there is no
        temperature.
        """
        checked = [self._record(f"record {number}", values) for number, values in enumerate(records, 1)]
        return self.predict_records(checked, calibrated)

    def predict_records(self, records: Sequence[Record], calibrated: bool = False) -> list[Prediction]:
        """As `predict`, for records that were read from a file."""
        if calibrated and self.temperature is None:
            raise missing_temperature(self.folder)
        with self._encoding:
            split = encode_split(Table(self.folder, tuple(records), labelled=False), self.kind, self._encoder, False)
        outputs, _ = self._inference.compute(split.examples)
        predictions = decode(self.kind, split, outputs)
        if not calibrated or self.temperature is None:
            return list(predictions)
        return [self.kind.calibrate(prediction, self.temperature) for prediction in predictions]

    def _record(self, place: str, values: Mapping[str, Any]) -> Record:
        roles = self.kind.config.columns.without_targets().cell_types()
        if set(values) != set(roles):
            raise UserError(f"{place}: expected {', '.join(roles)}; found {', '.join(values) or 'nothing'}")
        return Record(place, {role: read_value(values[role], roles[role], place, role) for role in roles})


def _usable_precision(model: PreTrainedModel, kind: TaskKind[Any], probe: Batch, device: Device) -> Device:
    """The device, in fp32 if the model cannot compute in its precision, as DeBERTa (v1) on a CPU."""
    if device.dtype is None or computes(model, kind, probe, device):
        return device
    name = model.config.model_type
    log.warning("%s cannot compute in %s on %s: predicting in fp32", name, device.precision, device.device.type)
    return replace(device, dtype=None)


def missing_temperature(folder: Path) -> UserError:
    return UserError(
        f"{folder}: the model has no temperature, so its probabilities cannot be calibrated; one is fitted on the "
        "validation split, for kinds whose predictions have a probability of each label"
    )
