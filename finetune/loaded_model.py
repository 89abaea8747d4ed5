"""A model folder, loaded to compute with: what prediction, mask filling and embeddings share."""

import logging
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.fast_linear import use_fast_linear
from finetune.device import Device, choose_device
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import Batch, Padding, collate
from finetune.model import ModelSpec, build_model, read_model_inputs
from finetune.saved_task import SavedTask
from finetune.task_kind import TaskKind
from finetune.training.compatibility import computes

log = logging.getLogger(__name__)

_UNLIMITED = 512  # tokens of a sequence, if neither the folder nor the model limits them
_MASKED_LM = "AutoModelForMaskedLM"


@dataclass(frozen=True)
class EncodedText:
    """A text as one sequence, ready to be batched with others."""

    tokens: Tokens

    @property
    def longest(self) -> int:
        """Tokens, special ones included."""
        return len(self.tokens)

    @property
    def sequences(self) -> tuple[Tokens, ...]:
        return (self.tokens,)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, with what encodes texts for it. Threads may share it."""

    folder: Path
    model: PreTrainedModel
    encoder: Encoder
    padding: Padding
    device: Device
    # A tokenizer of the tokenizers library cannot change its truncation while another thread uses it.
    encoding: threading.Lock = field(default_factory=threading.Lock)


def load_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, task: SavedTask, precision: str = "auto"
) -> LoadedModel:
    """Load the model in a folder, with the head of a task.

    precision: as in the training config. Raises UserError for a folder that is not usable, or whose weights lack the
    head.
    """
    kind = task.kind
    device = choose_device(precision, key="--precision")
    spec = ModelSpec(folder, True, kind.auto_model, kind.head)
    inputs = read_model_inputs(spec, tokenizer)
    built = build_model(spec)
    if built.new:
        problem = "has no masked-LM head" if kind.auto_model == _MASKED_LM else "is not fine-tuned"
        raise UserError(f"{folder}: the model {problem}: its weights lack {', '.join(built.new[:3])}")
    length = task.max_seq_length or min(inputs.max_length or _UNLIMITED, tokenizer.model_max_length)
    encoder = Encoder(tokenizer, length, inputs.token_types, kind.config.special_tokens_in_text)
    padding = replace(Padding.of(tokenizer), length=length if task.padded else None)
    model = built.model.to(device.device).eval().requires_grad_(False)
    use_fast_linear(model)
    probe = collate(kind, [kind.probe(encoder)], padding, device.device)
    return LoadedModel(folder, model, encoder, padding, _usable_precision(model, kind, probe, device))


def _usable_precision(model: PreTrainedModel, kind: TaskKind[Any], probe: Batch, device: Device) -> Device:
    """The device, in fp32 if the model cannot compute in its precision, as DeBERTa (v1) on a CPU."""
    if device.dtype is None or computes(model, kind, probe, device):
        return device
    name = model.config.model_type
    log.warning("%s cannot compute in %s on %s: predicting in fp32", name, device.precision, device.device.type)
    return replace(device, dtype=None)
