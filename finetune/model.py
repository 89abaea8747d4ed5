"""Load an encoder and put a task head on it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.positions import limit_tokenizer, max_positions
from experiment.tokenizer import vocabulary_size
from experiment.transformers_logging import quiet_transformers


@dataclass(frozen=True)
class ModelSpec:
    """What to build a model from."""

    folder: Path  # Hugging Face folder
    pretrained: bool  # False: its architecture, with random weights
    auto_model: str  # transformers class, such as AutoModelForSequenceClassification
    head: Mapping[str, Any]  # settings of its config, such as num_labels


@dataclass(frozen=True)
class ModelInputs:
    """What a model accepts."""

    max_length: int | None  # tokens; None: no limit
    token_types: bool  # whether it tells the two texts of a pair apart by token_type_ids


def read_model_inputs(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ModelInputs:
    """Inspect the model, built without weights.

    Raises UserError for a config that transformers does not support, and a vocabulary smaller than the tokenizer's.
    """
    with torch.device("meta"):
        model = _build_from_config(spec)
    largest, size = vocabulary_size(tokenizer) - 1, model.config.get_text_config().vocab_size
    if largest >= size:
        raise UserError(f"{spec.folder}: the tokenizer's ids go up to {largest}, vocab_size is {size}")
    return ModelInputs(max_positions(model), _has_token_types(model, tokenizer))


def _has_token_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return False
    if hasattr(model.config, "type_vocab_size"):
        return bool(model.config.type_vocab_size > 1)
    # XLNet and Funnel tell segments apart without type embeddings, and their tokenizers give the classification token
    # type 2. Other models that accept token types but have none (GPT-2, XLM) would add word embeddings by their ids.
    return bool(max(tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]) > 1)


def build_model(spec: ModelSpec) -> tuple[PreTrainedModel, list[str]]:
    """The model in fp32, and the names of its newly initialized parameters (drawn from torch's global generator).

    Raises UserError for weights that do not fit the config, or lack a part of the encoder.
    """
    if not spec.pretrained:
        model = _build_from_config(spec)
        return model, [name for name, _ in model.named_parameters()]
    auto_model = getattr(transformers, spec.auto_model)
    with quiet_transformers():
        try:
            model, report = auto_model.from_pretrained(
                spec.folder,
                config=load_model_config(spec.folder, **spec.head),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head for other labels is replaced; the encoder is checked below
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the weights in {spec.folder}: {error}") from None
    new = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    encoder = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name]
    if encoder:
        more = f" and {len(encoder) - 3} more" if len(encoder) > 3 else ""
        raise UserError(f"{spec.folder}: its weights do not fit its config: no {', '.join(encoder[:3])}{more}")
    return model, new


def load_model_config(folder: Path, **changes: Any) -> PreTrainedConfig:
    """The config of a model folder. changes: to its settings. Raises UserError if it cannot be read."""
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **changes
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the model config in {folder}: {error}") from None
    return config


def _build_from_config(spec: ModelSpec) -> PreTrainedModel:
    try:
        model: PreTrainedModel = getattr(transformers, spec.auto_model).from_config(
            load_model_config(spec.folder, **spec.head), dtype=torch.float32, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(f"{spec.folder}: {error}") from None
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, special_tokens_in_text: bool, folder: Path
) -> None:
    """Write a Hugging Face folder whose tokenizer gives the inputs of training. `truncation=True` cuts texts at the
    model's positions."""
    limit_tokenizer(tokenizer, model)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if not _has_token_types(model, tokenizer):
        names.remove("token_type_ids")
    for name, value in {"split_special_tokens": not special_tokens_in_text, "model_input_names": names}.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # attributes are saved only if they are also here
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
