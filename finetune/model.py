"""The encoder that a fine-tuning begins with: found, checked against the task, and given a fresh head."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from experiment.errors import UserError
from experiment.hugging_face import max_positions, quiet
from experiment.tokenizer import vocabulary_size


@dataclass(frozen=True)
class Initialisation:
    """What a model is built from."""

    folder: Path  # Hugging Face folder
    pretrained: bool  # False: its architecture only
    auto_model: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """What tokenisation needs to know about a model."""

    max_length: int | None  # tokens that its positions can hold; None: no limit
    token_types: bool  # tells the two texts of a pair apart


def read_architecture(start: Initialisation, tokenizer: Any) -> Architecture:
    """Build the model without memory and look at it.

    Raises UserError for a config that transformers does not know, and for a tokenizer with more tokens than the model.
    """
    with torch.device("meta"):
        model = _from_config(start)
    highest = vocabulary_size(tokenizer) - 1
    if highest >= model.config.vocab_size:
        raise UserError(
            f"{start.folder}: the tokenizer's ids go up to {highest}, vocab_size is {model.config.vocab_size}"
        )
    takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return Architecture(max_positions(model), takes_token_types and getattr(model.config, "type_vocab_size", 0) > 1)


def build_model(start: Initialisation) -> tuple[Any, list[str]]:
    """The model in fp32, and the names of the parameters that were initialised afresh (from torch's global generator).

    Raises UserError where the folder's weights leave parts of the encoder without values or do not fit it.
    """
    if not start.pretrained:
        model = _from_config(start)
        return model, [name for name, _ in model.named_parameters()]
    auto_model = getattr(transformers, start.auto_model)
    with quiet():
        try:
            model, loading = auto_model.from_pretrained(
                start.folder,
                config=_config(start),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head for other labels is replaced; the encoder is checked below
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the weights in {start.folder}: {error}") from None
    fresh = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    encoder = [name for name in fresh if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name]
    if encoder:
        more = f" and {len(encoder) - 3} more" if len(encoder) > 3 else ""
        raise UserError(f"{start.folder}: its weights do not fit its config: no {', '.join(encoder[:3])}{more}")
    return model, fresh


def _config(start: Initialisation) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            start.folder,
            local_files_only=True,
            trust_remote_code=False,
            num_labels=len(start.labels),
            id2label=dict(enumerate(start.labels)),
            label2id={label: number for number, label in enumerate(start.labels)},
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the model config in {start.folder}: {error}") from None


def _from_config(start: Initialisation) -> Any:
    try:
        return getattr(transformers, start.auto_model).from_config(_config(start), dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"{start.folder}: {error}") from None


def save_model(model: Any, tokenizer: Any, max_length: int, folder: Path) -> None:
    """Write a Hugging Face folder that cuts its inputs at `max_length` tokens, as in training."""
    tokenizer.model_max_length = max_length
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
