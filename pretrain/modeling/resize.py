"""A model made larger than the folder it comes from: rows for added words, more positions."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from experiment.errors import UserError

_LEARNED = "position_embeddings.weight"


def with_positions(
    config: PreTrainedConfig, usable: int | None, first: int, wanted: int, rope: bool
) -> PreTrainedConfig:
    """The config of the same model with `wanted` usable positions instead of `usable`.

    first: position id of a sequence's first token. Learned positions are repeated by `enlarge`. Rotary ones of full
    attention get a larger base by the NTK-aware formula (bloc97 2023; Peng et al. 2023, "YaRN", section 3.1),
    base · s^(d / (d - 2)) for s times the positions and heads of d dimensions: the slowest rotation then covers the new
    length as it covered the old one, and the fastest hardly changes. `rope` False leaves the base as it is. Raises
    UserError for fewer positions than there are, and for models whose positions are of another kind.
    """
    if usable is None or not (_learned_positions(config) or _rotary(config)):
        raise UserError(
            f"model.max_positions: the positions of '{config.model_type}' are neither learned nor rotary embeddings "
            "that could be extended"
        )
    if wanted < usable:
        raise UserError(f"model.max_positions is {wanted}, but the model has {usable} usable positions already")
    larger = copy.deepcopy(config)
    larger.max_position_embeddings = wanted + first
    if rope and wanted > usable:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for rotary in _rotary(larger):
            if rotary.get("rope_type", "default") != "default":
                raise UserError(
                    f"model.max_positions: the rotary positions of the model are scaled already "
                    f"('{rotary['rope_type']}'); set model.config.rope_parameters as a whole"
                )
            rotary["rope_theta"] *= (wanted / usable) ** (size / (size - 2))
    return larger


def enlarge(
    model: PreTrainedModel, config: PreTrainedConfig, usable: int | None, pieces: Mapping[int, Sequence[int]]
) -> PreTrainedModel:
    """The model as `config` describes it: the same but for a larger vocabulary and more positions.

    usable: positions that the model has so far. pieces: id of each added token -> the ids that its text had before.
    What an added token is embedded as and is predicted by, bias included, is the mean of its pieces, or of all tokens
    where it has none. Learned positions are repeated blockwise (Beltagy et al. 2020, "Longformer", section 5), so that
    nothing changes up to the old limit and local order is known from the start beyond it.
    """
    larger: PreTrainedModel = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    old = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if parameter.shape == old[name].shape:
                parameter.copy_(old[name])
            elif name.endswith(_LEARNED):
                assert usable is not None
                parameter.copy_(_repeated(old[name], len(parameter), len(old[name]) - usable))
            elif (len(old[name]), len(parameter)) == (model.config.vocab_size, config.vocab_size):
                parameter[: len(old[name])] = old[name]
            else:
                raise UserError(
                    f"model.max_positions: '{config.model_type}' then has the shape {tuple(parameter.shape)} for "
                    f"'{name}', and the weights have {tuple(old[name].shape)}"
                )
        known = sorted(set(range(model.config.vocab_size)) - pieces.keys())
        for table in _vocabulary_tables(larger):
            average = table[known].mean(0)
            for token, parts in pieces.items():
                table[token] = table[list(parts)].mean(0) if parts else average
    larger.load_state_dict(_persistent_buffers(model, larger), strict=False)
    return larger


def _repeated(table_PD: Tensor, rows: int, first: int) -> Tensor:
    """The table with its rows from `first` on, before which none is a position, repeated until there are `rows`."""
    positions = torch.arange(rows - first) % (len(table_PD) - first) + first
    return torch.cat([table_PD[:first], table_PD[positions]])


def _vocabulary_tables(model: PreTrainedModel) -> list[Tensor]:
    """Whatever has a row for each token, tied tensors once: input embeddings, decoder, decoder bias."""
    output = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, output.weight, getattr(output, "bias", None)]
    return list({id(table): table for table in tables if table is not None}.values())


def _persistent_buffers(model: nn.Module, larger: nn.Module) -> dict[str, Tensor]:
    kept, target = model.state_dict(), dict(larger.named_buffers())
    return {name: kept[name] for name, buffer in target.items() if name in kept and kept[name].shape == buffer.shape}


def _learned_positions(config: PreTrainedConfig) -> bool:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    return any(name.endswith(_LEARNED) for name, _ in model.named_parameters())


def _rotary(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of the layers that attend to everything; a local window never sees the new distances."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in parameters:
        return [parameters]
    return [kind for name, kind in parameters.items() if name != "sliding_attention" and "rope_theta" in (kind or {})]
