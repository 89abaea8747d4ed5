"""The `model` section of a pretraining config and a tokenizer -> a transformers config, checked."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from experiment.config import did_you_mean
from experiment.errors import UserError, first_line, user_errors_in
from experiment.models.config_fields import check_fields, declared_fields, with_fields
from experiment.models.model_folder import build_from_config, load_model_config
from experiment.models.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from experiment.models.transformers_models import quiet_transformers
from pretrain.config import ModelConfig
from pretrain.corpus.added_tokens import check_extends
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.resize import config_with_positions
from pretrain.modeling.structure import decoder_of

_UNTRAINABLE = {
    "mra": "without its CUDA kernel transformers computes no attention, and with it only rows of certain widths",
    "reformer": "transformers trains it on rows of certain widths only",
}
_SPECIAL_TOKEN_IDS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def resolve_model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the transformers config of the model to train. The tokenizer sets vocabulary size and special token ids.

    Raises UserError for an unknown model type or field, a type without a masked-LM head, a folder that cannot be read,
    a vocabulary smaller than the tokenizer's, and a padding id other than the tokenizer's.
    """
    default = _default_config(model)
    _check_trainable(default, model.activation_checkpointing)
    fields = _fields(model)
    if model.init_from is None:
        check_fields(fields, partial(_new_config, default, tokenizer))
        config = _new_config(default, tokenizer, fields)
    else:
        check_fields(fields, partial(with_fields, default))
        config = _resized_config(model, tokenizer)
    padding = config.get_text_config().pad_token_id
    if padding != tokenizer.pad_token_id and (model.init_from is None or "pad_token_id" in fields):
        raise UserError(
            f"model.config.pad_token_id is {padding}, the tokenizer's padding token is {tokenizer.pad_token_id}"
        )
    _check_settings(config)
    largest = max(tokenizer.get_vocab().values())
    size = config.get_text_config().vocab_size
    if (size or 0) <= largest:
        raise UserError(f"the model's vocab_size is {size}, but the tokenizer's ids go up to {largest}")
    return config


def source_config(model: ModelConfig) -> PreTrainedConfig:
    """Return the config that matches the weights in `model.init_from`, with the fields of `model.config` set.

    Raises UserError for one that makes no model, or a far larger one, and for one that unties a model without decoder.
    """
    assert model.init_from is not None
    folder = Path(model.init_from)
    fields = _fields(model)
    config = with_fields(_read_config(folder), fields)
    with quiet_transformers(), torch.device("meta"):
        built = build_from_config(AutoModelForMaskedLM, config, f"model.init_from: {folder / 'config.json'}", folder)
    if fields.get("tie_word_embeddings") is False and decoder_of(built) is None:
        raise UserError(
            f"model.config.tie_word_embeddings: the head in {folder} multiplies by the embeddings, so it stays tied; "
            "leave the key out"
        )
    return config


def check_tokenizer(model: ModelConfig, corpus_fingerprint: str, corpus: Path) -> None:
    """Raise UserError unless the corpus was built with the tokenizer of `model.init_from`, or with `model.added_tokens`
    if set, which must extend it."""
    if model.init_from is None:
        return
    folder, tokenizer = model.init_from, _load_tokenizer("init_from", model.init_from)
    if model.added_tokens is not None:
        folder, extended = model.added_tokens, _load_tokenizer("added_tokens", model.added_tokens)
        with user_errors_in(f"model.added_tokens: {folder}"):
            check_extends(extended, tokenizer)
        tokenizer = extended
    if tokenizer_fingerprint(tokenizer) != corpus_fingerprint:
        extends = ", or set model.added_tokens if its own adds tokens to that one"
        raise UserError(
            f"the corpus {corpus} was built with another tokenizer than the one in {folder}. Rebuild the corpus with "
            f"`--tokenizer {folder}`{'' if model.added_tokens else extends}"
        )


def _default_config(model: ModelConfig) -> PreTrainedConfig:
    """Return the config without the fields of `model.config`: the model type's defaults, or the config of
    `model.init_from`."""
    model_type = (model.config or {}).get("model_type")
    if model.init_from is not None:
        config = _read_config(Path(model.init_from))
        if model_type not in (None, config.model_type):
            raise UserError(
                f"model.config.model_type is '{model_type}', but the model in {model.init_from} is of type "
                f"'{config.model_type}'; leave it out"
            )
        return config
    model_type = str(model_type)
    if model_type not in CONFIG_MAPPING:
        nearest = did_you_mean(model_type, MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        raise UserError(f"model.config.model_type: unknown model type '{model_type}'{nearest}")
    return AutoConfig.for_model(model_type)


def _check_trainable(config: PreTrainedConfig, activation_checkpointing: bool) -> None:
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"model: '{config.model_type}' has no masked-LM head in transformers")
    if activation_checkpointing and not MODEL_FOR_MASKED_LM_MAPPING[type(config)].supports_gradient_checkpointing:
        raise UserError(
            f"model.activation_checkpointing: transformers does not support it for '{config.model_type}'; "
            "if memory runs out, lower batch.microbatch_tokens"
        )


def _check_settings(config: PreTrainedConfig) -> None:
    """Raise UserError for a type that cannot be trained, or not with its defaults."""
    if config.model_type == "xmod" and config.default_language is None:
        raise UserError(
            "model.config.default_language: 'xmod' has adapters for each language; expected that of the corpus, "
            f"such as {config.languages[0]}"
        )
    if getattr(config.get_text_config(), "is_decoder", False):
        raise UserError(
            "model: its config has is_decoder: true, which means causal attention; set model.config.is_decoder to false"
        )
    if config.model_type == "big_bird" and config.attention_type != "original_full":
        raise UserError(
            f"model.config.attention_type is {config.attention_type!r}; expected original_full: transformers switches "
            "to full attention at the first short sequence"
        )
    if "longrope" in str(getattr(config.get_text_config(), "rope_parameters", None)):
        raise UserError(
            "model.config.rope_parameters: with 'longrope' the positions of all sequences depend on the longest one of "
            "their microbatch; use another rope_type, such as yarn"
        )
    if config.model_type in _UNTRAINABLE:
        raise UserError(f"model: '{config.model_type}' cannot be trained: {_UNTRAINABLE[config.model_type]}")


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {field: value for field, value in (model.config or {}).items() if field != "model_type"}


def _new_config(
    default: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, fields: Mapping[str, Any]
) -> PreTrainedConfig:
    """Make a config. Raises UserError for values that make none."""
    text = default.get_text_config()
    declared = declared_fields(text)
    ids = {name: getattr(tokenizer, name) for name in _SPECIAL_TOKEN_IDS if name in declared}
    if default.model_type == "big_bird":  # see `load_model_config`
        ids["attention_type"] = "original_full"
    tokenizer_fields = {"vocab_size": vocabulary_size(tokenizer), "pad_token_id": tokenizer.pad_token_id} | ids
    all_fields = tokenizer_fields | dict(fields)
    if text is not default:  # a part of it, as in ModernVBERT
        chosen = fields.get("text_config", {})
        merged = {"model_type": text.model_type} | tokenizer_fields | chosen if isinstance(chosen, dict) else chosen
        all_fields = dict(fields) | {"text_config": merged}
    try:
        return AutoConfig.for_model(default.model_type, **all_fields)
    except Exception as error:  # transformers raises many types
        raise UserError(f"model.config: {first_line(error)}") from None


def _resized_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the config of the model in `model.init_from` with room for added tokens and positions."""
    config = source_config(model)
    if model.max_positions is not None:
        scale_rope = "rope_parameters" not in (model.config or {})
        config = config_with_positions(meta_model(config), model.max_positions, scale_rope)
    if model.added_tokens is not None:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, vocabulary_size(tokenizer))
    return config


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.init_from: {folder} is not a Hugging Face folder: it has no config.json")
    with user_errors_in("model.init_from"):
        return load_model_config(folder)


def _load_tokenizer(key: str, folder: str) -> PreTrainedTokenizerFast:
    with user_errors_in(f"model.{key}"):
        return load_tokenizer(folder)
