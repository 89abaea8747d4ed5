"""A loaded model folder, for prediction, mask filling and embeddings."""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from experiment.errors import UserError
from experiment.models.fast_linear import use_fast_linear
from experiment.models.model_folder import first_use
from finetune.device import CPU, Device, choose_device
from finetune.encoding.encoder import Encoder, load_task_tokenizer
from finetune.encoding.examples import Batch, Padding
from finetune.inference import collate, describe_not_finite
from finetune.model import ModelSpec, build_model, read_model_inputs
from finetune.model_trial import computes, ignores_padding
from finetune.prediction.onnx_model import OnnxModel, holds_onnx_model
from finetune.prediction.saved_task import SavedTask
from finetune.task_kind import TaskKind

log = logging.getLogger(__name__)

_UNLIMITED = 512  # tokens of a sequence, if neither the folder nor the model limits them


class NotFiniteError(UserError):
    """The outputs of a model are infinite or NaN."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, and the encoder of its texts. Threads may share it."""

    folder: Path
    model: PreTrainedModel | OnnxModel
    encoder: Encoder
    padding: Padding
    device: Device
    # A tokenizer of the tokenizers library cannot change its truncation while another thread uses it.
    tokenizer_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16, or int8 for some ONNX models."""
        return self.model.precision if isinstance(self.model, OnnxModel) else self.device.precision

    def check_finite(self, outputs: Iterable[NDArray[np.float32] | Sequence[float]]) -> None:
        """Raise NotFiniteError unless all outputs are finite."""
        if not all(np.isfinite(each).all() for each in outputs):
            raise NotFiniteError(f"{self.folder}: {describe_not_finite(self.precision)}")


def load_model(folder: Path, task: SavedTask, precision: str) -> LoadedModel:
    """Load the model in a folder, with the head of a task, to compute with it as fast as possible.

    precision: as in the training config. Raises UserError for a folder that is not usable, or whose weights lack the
    head, and for a precision that an ONNX model does not have.
    """
    if holds_onnx_model(folder):
        loaded = load_on_cpu(folder, task)
        if precision not in ("auto", loaded.precision):
            raise UserError(f"--precision: the ONNX model in {folder} computes in {loaded.precision} only; use auto")
        return loaded
    device = choose_device(precision, key="--precision")
    loaded = load_on_cpu(folder, task)
    loaded.model.to(device.torch_device)
    use_fast_linear(loaded.model)
    probe = _probe(replace(loaded, device=device), task.kind)
    if device.dtype is not None and not computes(loaded.model, task.kind, probe, device):  # as DeBERTa (v1) on a CPU
        name = loaded.model.config.model_type
        log.warning(
            "%s cannot compute in %s on %s: predicting in fp32", name, device.precision, device.torch_device.type
        )
        device = replace(device, dtype=None)
    return replace(loaded, device=device)


def load_on_cpu(folder: Path, task: SavedTask) -> LoadedModel:
    """Return the model as transformers computes it, in fp32; or the ONNX model in the folder. Raises UserError."""
    tokenizer = load_task_tokenizer(folder, task.kind.config)
    spec = ModelSpec(folder, True, task.kind.auto_model, task.kind.head)
    inputs = read_model_inputs(spec, tokenizer)
    model = (OnnxModel(folder) if holds_onnx_model(folder) else _build(spec)).eval().requires_grad_(False)
    length = task.max_seq_length or inputs.default_length or _UNLIMITED
    special_tokens_in_text = task.kind.config.special_tokens_in_text
    encoder = Encoder(tokenizer, length, inputs.token_types, special_tokens_in_text, task.spaced_words)
    padding = Padding.of(tokenizer)
    if task.padded:
        padding = replace(padding, length=length)
    elif isinstance(model, OnnxModel) and model.precision == "int8":  # its outputs depend on a batch anyway
        padding = replace(padding, is_avoided=model.avoids_padding)
    elif task.padded is None:
        ignores = ignores_padding(model, task.kind, padding, task.kind.probe(encoder), length)
        padding = replace(padding, is_avoided=not ignores)
    loaded = LoadedModel(folder, model, encoder, padding, CPU)
    with first_use(model), torch.inference_mode():
        loaded.check_finite([task.kind.forward(model, _probe(loaded, task.kind)).float().numpy()])
    return loaded


def _build(spec: ModelSpec) -> PreTrainedModel:
    if (built := build_model(spec)).new:
        problem = "has no masked-LM head" if spec.auto_model == "AutoModelForMaskedLM" else "is not fine-tuned"
        raise UserError(f"{spec.folder}: the model {problem}: its weights lack {', '.join(built.new[:3])}")
    return built.model


def _probe(loaded: LoadedModel, kind: TaskKind[Any]) -> Batch:
    """Make the smallest batch."""
    return collate(kind, [kind.probe(loaded.encoder)], loaded.padding, loaded.device.torch_device)
