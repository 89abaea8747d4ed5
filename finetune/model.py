"""The encoder that a fine-tuning begins with: found, checked against the task, and given a fresh head."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from experiment.errors import UserError


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


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a Hugging Face folder. Raises UserError where there is none, or none that can pad."""
    names = (
        "tokenizer.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer_config.json",
    )
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} has no tokenizer: expected tokenizer.json, vocab.txt or the like beside config.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {error}") from None
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no padding token")
    return tokenizer


def read_architecture(start: Initialisation, tokenizer: Any) -> Architecture:
    """Build the model without memory and look at it.

    Raises UserError for a config that transformers does not know, and for a tokenizer with more tokens than the model.
    """
    with torch.device("meta"):
        model = _from_config(start)
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.config.vocab_size:
        raise UserError(
            f"{start.folder}: the tokenizer's ids go up to {highest}, vocab_size is {model.config.vocab_size}"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # The RoBERTa family counts positions from padding_idx + 1.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return Architecture(limit, takes_token_types and getattr(model.config, "type_vocab_size", 0) > 1)


def build_model(start: Initialisation) -> tuple[Any, list[str]]:
    """The model in fp32, and the names of the parameters that were initialised afresh (from torch's global generator).

    Raises UserError where the folder's weights leave parts of the encoder without values or do not fit it.
    """
    if not start.pretrained:
        model = _from_config(start)
        return model, [name for name, _ in model.named_parameters()]
    auto_model = getattr(transformers, start.auto_model)
    with _quiet():
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
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: a fresh head, which the run says in one line, reads badly."""
    disabled = logging.root.manager.disable
    bars = transformers.logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers.logging.enable_progress_bar()
