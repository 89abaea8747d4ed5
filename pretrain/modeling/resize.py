"""Resize a model from a Hugging Face folder: rows for added tokens, more positions."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from experiment.errors import UserError
from experiment.models.model_folder import build_from_config
from experiment.models.transformers_models import configured_positions, first_position, max_positions
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.structure import decoder_of

_LEARNED_POSITIONS = "position_embeddings.weight"


def has_learned_positions(model: PreTrainedModel) -> bool:
    """Return whether each position has an embedding of its own, which only sequences of that length train."""
    return any(name.endswith(_LEARNED_POSITIONS) for name, _ in model.named_parameters())


def config_with_positions(model: PreTrainedModel, wanted: int, scale_rope: bool) -> PreTrainedConfig:
    """Return the config of the same model for sequences of up to `wanted` tokens. The model may be on the meta device.

    Learned positions are extended by `resize_model`. Rotary positions of full attention get a larger base by the
    NTK-aware formula (bloc97 2023; Peng et al. 2023, "YaRN", section 3.1), base · s^(d / (d - 2)) for s times the
    positions and d rotated dimensions of a head: the slowest rotation then covers the new length as it covered the old
    one, and the fastest hardly changes. `scale_rope` False keeps the base. Relative positions of DeBERTa keep their
    largest distance, which also stands for the new ones beyond it. Raises UserError for fewer positions than
    the model has, and for models whose positions are of another kind.
    """
    config = model.config
    relative = getattr(config, "relative_attention", False)  # of DeBERTa
    present = configured_positions(model)
    if present is None or not (relative or has_learned_positions(model) or _rope_parameters(config)):
        raise UserError(f"model.max_positions: the positions of '{config.model_type}' cannot be extended")
    if wanted < present:
        raise UserError(f"model.max_positions is {wanted}, but the model has {present} usable positions already")
    larger = copy.deepcopy(config)
    larger.max_position_embeddings = wanted + first_position(model)
    if relative and wanted > present and config.max_relative_positions < 1:  # which means max_position_embeddings
        larger.max_relative_positions = config.max_position_embeddings
    if scale_rope and wanted > present:
        for rope in _rope_parameters(larger):
            if rope.get("rope_type", "default") != "default":
                raise UserError(
                    f"model.max_positions: the model's rotary positions are already scaled ('{rope['rope_type']}'); "
                    "set model.config.rope_parameters as a whole"
                )
            head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            dimensions = int(head_size * rope.get("partial_rotary_factor", 1.0))
            rope["rope_theta"] *= (wanted / present) ** (dimensions / (dimensions - 2))
    return larger


def resize_model(
    model: PreTrainedModel, config: PreTrainedConfig, pieces: Mapping[int, Sequence[int]]
) -> PreTrainedModel:
    """Return a model with the weights of `model` and the larger vocabulary and positions of `config`.

    pieces: id of each added token -> the ids that its text had before. Embedding, decoder row and decoder bias of an
    added token are the mean of its pieces', or of all tokens' if it has none. Learned positions are repeated blockwise
    (Beltagy et al. 2020, "Longformer", section 5): nothing changes up to the old limit, and beyond it local order is
    known from the start. Raises UserError if `config` changes another shape.
    """
    decoder = decoder_of(model)
    if decoder is not None and decoder.weight is not model.get_input_embeddings().weight:  # whatever the config says
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    larger = build_from_config(AutoModelForMaskedLM, config, "model.init_from", dtype=torch.float32)
    _copy_parameters(model, larger)
    with torch.no_grad():
        old_tokens = sorted(set(range(_vocabulary_size(model))) - pieces.keys())
        for table_VD in _vocabulary_tables(larger):
            average = table_VD[old_tokens].mean(0)
            for token, parts in pieces.items():
                table_VD[token] = table_VD[list(parts)].mean(0) if parts else average
    larger.load_state_dict(_persistent_buffers(model, larger), strict=False)
    return larger


@torch.no_grad()
def _copy_parameters(model: PreTrainedModel, larger: PreTrainedModel) -> None:
    """Copy parameters of equal shape, repeat position tables, and fill vocabulary tables up to the old size."""
    old = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in larger.named_parameters():
        if parameter.shape == old[name].shape:
            parameter.copy_(old[name])
        elif name.endswith(_LEARNED_POSITIONS):
            positions = max_positions(model)
            assert positions is not None
            parameter.copy_(_repeated(old[name], len(parameter), len(old[name]) - positions))
        elif (len(old[name]), len(parameter)) == (_vocabulary_size(model), _vocabulary_size(larger)):
            parameter[: len(old[name])] = old[name]
        else:
            key = "added_tokens" if _vocabulary_size(model) != _vocabulary_size(larger) else "max_positions"
            raise UserError(
                f"model.{key}: it would change the shape of '{name}' in '{larger.config.model_type}' to "
                f"{tuple(parameter.shape)}; the weights have {tuple(old[name].shape)}"
            )


def _repeated(table_PD: Tensor, rows: int, first: int) -> Tensor:
    """Return the table with the rows from `first` repeated until there are `rows`; earlier rows are not positions."""
    positions = torch.arange(rows - first) % (len(table_PD) - first) + first
    return torch.cat([table_PD[:first], table_PD[positions]])


def _vocabulary_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _vocabulary_tables(model: PreTrainedModel) -> list[Tensor]:
    """Return the parameters with a row per token, which have more rows with a larger vocabulary: embeddings (NeoMME
    has two), decoder and its bias; tied ones once."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size += 1
    larger = dict(meta_model(config).named_parameters())
    return [table for name, table in model.named_parameters() if larger[name].shape[:1] != table.shape[:1]]


def _persistent_buffers(model: nn.Module, larger: nn.Module) -> dict[str, Tensor]:
    kept, target = model.state_dict(), dict(larger.named_buffers())
    return {name: kept[name] for name, buffer in target.items() if name in kept and kept[name].shape == buffer.shape}


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters of layers with full attention; a local window never spans the new distances."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in parameters:
        return [parameters]
    return [kind for name, kind in parameters.items() if name != "sliding_attention" and "rope_theta" in (kind or {})]
