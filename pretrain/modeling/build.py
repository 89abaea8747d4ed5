"""Config -> a transformers masked-LM model, from nothing or from a Hugging Face folder, and how it is to be fed."""

import inspect
import logging
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiment.config import nearest
from experiment.errors import UserError
from experiment.hugging_face import first_position, max_positions, quiet
from experiment.tokenizer import load_tokenizer, tokenizer_fingerprint
from pretrain.config import ModelConfig
from pretrain.corpus.added_tokens import check_extends, old_pieces
from pretrain.modeling.attention import PACKED, register_packed_attention
from pretrain.modeling.resize import enlarge, with_positions

log = logging.getLogger(__name__)

_CHECK_TOLERANCE = 1e-4  # logits of a packed and a single sequence, fp32


@dataclass(frozen=True)
class BuiltModel:
    model: PreTrainedModel
    packed: bool  # several sequences share a window; else one sequence a row, padded
    first_position: int  # position id of a sequence's first token


def resolve_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The transformers config of the model, its vocabulary filled in from the tokenizer.

    Raises UserError for an unknown model type or field, a type without masked-LM head, a folder that cannot be read, a
    vocabulary smaller than the tokenizer's, and padding ids that disagree.
    """
    fields = dict(model.config or {})
    if model.init_from is not None:
        config = _read_config(Path(model.init_from))
        if fields.pop("model_type", config.model_type) != config.model_type:
            raise UserError(
                f"model.config.model_type is '{(model.config or {})['model_type']}', but the model in "
                f"{model.init_from} is of type '{config.model_type}'; leave it out"
            )
    else:
        model_type = str(fields.pop("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"model.config.model_type: unknown model type '{model_type}'{nearest(model_type, _masked_lm_types())}"
            )
        config = AutoConfig.for_model(model_type)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"model: '{config.model_type}' has no masked-LM head in transformers")
    if model.activation_checkpointing and not MODEL_FOR_MASKED_LM_MAPPING[type(config)].supports_gradient_checkpointing:
        raise UserError(
            f"model.activation_checkpointing: transformers cannot recompute the activations of '{config.model_type}'; "
            "lower batch.microbatch_tokens if memory runs out"
        )
    known = {**config.to_dict(), **config.attribute_map}
    for field in fields:
        if field not in known and not _is_read(field, config):
            raise UserError(
                f"unknown config key 'model.config.{field}' for '{config.model_type}'{nearest(field, known)}"
            )
    if model.init_from is None:
        given = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | fields
        given |= {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
            if name in known and name not in fields
        }
        if given["pad_token_id"] != tokenizer.pad_token_id:
            raise UserError(
                f"model.config.pad_token_id is {given['pad_token_id']}, "
                f"the tokenizer's padding token is {tokenizer.pad_token_id}"
            )
        try:
            config = AutoConfig.for_model(config.model_type, **given)
        except Exception as error:  # transformers raises many types for values that make no model
            raise UserError(f"model.config: {_first_line(error)}") from None
    else:
        config = _extended(_source_config(model), model, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if config.vocab_size <= largest:
        raise UserError(f"the model's vocab_size is {config.vocab_size}, but the tokenizer's ids go up to {largest}")
    return config


def check_tokenizer(model: ModelConfig, corpus_fingerprint: str, corpus: Path) -> None:
    """Raises UserError unless the corpus was built with the tokenizer of the model that training begins with, or with
    the one that adds words to it."""
    if model.init_from is None:
        return
    folder, own = model.init_from, _own_tokenizer("init_from", model.init_from)
    if model.added_tokens is not None:
        folder, extended = model.added_tokens, _own_tokenizer("added_tokens", model.added_tokens)
        try:
            check_extends(extended, own)
        except UserError as error:
            raise UserError(f"model.added_tokens: {folder}: {error}") from None
        own = extended
    if tokenizer_fingerprint(own) != corpus_fingerprint:
        raise UserError(
            f"the corpus {corpus} was built with another tokenizer than the one in {folder}; its token ids mean "
            f"something else to this model. Build the corpus again with `--tokenizer {folder}`"
        )


def _own_tokenizer(key: str, folder: str) -> PreTrainedTokenizerFast:
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"model.{key}: {error}") from None


def build_model(model: ModelConfig, config: PreTrainedConfig, seed: int) -> BuiltModel:
    """The model in fp32 on the CPU, the same on every rank. Raises UserError for weights that do not fit the config."""
    register_packed_attention()
    torch.manual_seed(seed)
    built = _continued(model, config) if model.init_from else _from_nothing(config)
    built.float()
    first = first_position(built)
    reason = _why_not_packed(built, first)
    if reason:
        built.set_attn_implementation("sdpa" if built._supports_sdpa else "eager")
        log.warning("'%s' trains padded, one sequence a row: %s", config.model_type, reason)
    if model.activation_checkpointing:
        _recompute_activations(built)
    return BuiltModel(built, packed=reason is None, first_position=first)


def usable_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's positions suffice for, None where it has no limit."""
    return max_positions(skeleton(config))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights. Raises UserError for a config that makes no model."""
    with torch.device("meta"):
        return _from_nothing(config)


def _recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each layer for the backward pass (Chen et al. 2016), which computes the rest once more.

    The state of torch's generator is put back for it, so dropout draws the same masks.
    """
    model.config.use_cache = False  # encoders keep no cache; transformers would warn that it cannot be had besides
    # The public name of this is another one in each of the releases of transformers that we run on.
    model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))


def _source_config(model: ModelConfig) -> PreTrainedConfig:
    """The config that the weights in the folder fit, with the fields that the user changes."""
    assert model.init_from is not None
    config = _read_config(Path(model.init_from))
    for field, value in (model.config or {}).items():
        setattr(config, field, value)
    return config


def _extended(config: PreTrainedConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The config of a folder's model with room for added tokens and positions."""
    if model.max_positions is not None:
        first, rope = first_position(skeleton(config)), "rope_parameters" not in (model.config or {})
        config = with_positions(config, usable_positions(config), first, model.max_positions, rope)
    if model.added_tokens is not None:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
    return config


def _continued(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    assert model.init_from is not None
    source = _source_config(model)
    built = _from_folder(Path(model.init_from), source)
    if model.added_tokens is None and model.max_positions is None:
        return built
    pieces = {}
    if model.added_tokens is not None:
        pieces = old_pieces(load_tokenizer(model.added_tokens), load_tokenizer(model.init_from))
    return enlarge(built, config, usable_positions(source), pieces)


def _from_nothing(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForMaskedLM.from_config(config)
    except Exception as error:  # as above
        raise UserError(f"model.config: makes no '{config.model_type}' model: {_first_line(error)}") from None


def _from_folder(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    with quiet():
        try:
            model, report = AutoModelForMaskedLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
        except Exception as error:  # transformers raises many types for values that make no model
            raise UserError(f"model.init_from: cannot load the weights in {folder}: {_first_line(error)}") from None
    for name, there, here in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model.init_from: in {folder} the shape of {name} is {list(there)}, but the config makes it {list(here)}; "
            "model.config may only change what the weights do not depend on"
        )
    missing = sorted(report["missing_keys"])
    encoder = f"{model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(encoder)]
    if lost:
        raise UserError(
            f"model.init_from: {folder} has no weights for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}"
        )
    if missing:
        log.warning("%s has no masked-LM head; a fresh one is trained (%s)", folder, ", ".join(missing))
    unused = [name for name in sorted(report["unexpected_keys"]) if re.search(r"\.\d+\.", name)]  # of a layer, that is
    if unused:
        log.warning(
            "the config has fewer layers than %s: %d tensors are left out (%s …)", folder, len(unused), unused[0]
        )
    return model


def _why_not_packed(model: PreTrainedModel, first_position: int) -> str | None:
    """None if the model, packed, gives the logits that it gives each sequence alone; else why it cannot be packed.

    Tried, not assumed: an architecture may take the attention function and still mix sequences elsewhere (convolutions,
    relative positions).
    """
    if not type(model)._supports_attention_backend:
        return "its attention cannot be replaced through transformers' attention interface"
    model.set_attn_implementation(PACKED)
    training = model.training
    model.eval()
    width, lengths = 12, (7, 4)
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    if getattr(model.config, "mask_token_id", None) is not None:
        ids[:3] = model.config.mask_token_id  # ESM scales a row's embeddings by its share of masked tokens
    packed = _probe_inputs(ids, lengths, width, first_position)
    try:
        with torch.inference_mode():
            together = model(**packed).logits[0]
            start = 0
            for length in lengths:
                alone = model(**_probe_inputs(ids[start : start + length], (length,), length, first_position)).logits[0]
                if not torch.allclose(
                    alone, together[start : start + length], atol=_CHECK_TOLERANCE, rtol=_CHECK_TOLERANCE
                ):
                    return "packed sequences would influence each other"
                start += length
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        return f"it does not take packed input ({_first_line(error)})"
    finally:
        model.train(training)
    return None


def _probe_inputs(ids: torch.Tensor, lengths: tuple[int, ...], width: int, first_position: int) -> dict[str, Any]:
    free = width - sum(lengths)
    positions = torch.cat([torch.arange(length) for length in (*lengths, free)]) + first_position
    segments = torch.cat([torch.full((length,), number + 1) for number, length in enumerate(lengths)])
    bounds = torch.cumsum(torch.tensor([0, *lengths, *([free] if free else [])]), 0)
    return {
        "input_ids": torch.cat([ids, ids.new_zeros(free)])[None],
        "position_ids": positions[None],
        "segments": torch.cat([segments, segments.new_zeros(free)])[None].int(),
        "cu_seqlens": bounds.int(),
    }


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.init_from: {folder} is no Hugging Face folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.init_from: cannot read {folder / 'config.json'}: {_first_line(error)}") from None


def _is_read(field: str, config: PreTrainedConfig) -> bool:
    """Whether transformers reads a field that is not among the config's defaults: some are looked for by name only."""
    sources = (type(config), MODEL_FOR_MASKED_LM_MAPPING[type(config)])
    return any(re.search(rf"\b{re.escape(field)}\b", inspect.getsource(sys.modules[s.__module__])) for s in sources)


def _masked_lm_types() -> list[str]:
    return [name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_MASKED_LM_MAPPING]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
