"""The structure of a transformers model: its repeated layers, the layer and part of each parameter, its FLOPs.

Floating-point operations (FLOPs) of a training step, forward and backward, per real token:

    6 N_encoder  +  12 h sum over layers of s_eff  +  6 r (V + h) d

N_encoder: parameters outside the embeddings and the head, shared ones (ALBERT) once for each layer;
s_eff = sum(s^2) / sum(s) over the sequences, at most the local window where a layer has one; r: the fraction of tokens
that are predicted; h: hidden size; V: vocabulary size; d: width of the decoder, h unless embeddings are factorized.
(Kaplan et al. 2020, section 2.1, with attention inside each sequence only.)

Padding and recomputed activations do not count. The last layer counts in full, although it computes predicted positions
only (`pretrain.modeling.last_layer`).
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Forward = Callable[..., Any]

_NUMBERED = re.compile(r"\.(\d+)\.")
_BELOW_LAYERS = ("deberta.encoder.LayerNorm.", "deberta.encoder.conv.")  # registered after them
_FLOPS_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


def encoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers in order; none for the few types of models without a `GradientCheckpointingLayer`."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def forward_without_checkpointing(layer: GradientCheckpointingLayer) -> Forward:
    """Return the layer's own `forward`, which transformers wraps for activation checkpointing."""
    forward: Forward = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
    return MethodType(forward, layer)


def layer_ids(model: PreTrainedModel, unused: Collection[str] = ()) -> dict[str, int]:
    """Return parameter name -> 0 for embeddings, 1 … L for the encoder's layers from the bottom, L + 1 for the head.
    `unused`: names of parameters that the model does not use, such as a vision tower's, whose layers do not count.

    The numbering of ELECTRA (Clark et al. 2020) and BEiT. A layer is the outermost numbered module of the encoder, so
    layers that share their weights count once. Parameters shared by all layers (relative positions) and those before
    the first layer count as embeddings, those after the last layer (a final norm) as head.
    """
    encoder = f"{model.base_model_prefix}."
    tables = _tables(model)
    ids: dict[str, int] = {}
    layers = 0
    for name, parameter in model.named_parameters():
        in_encoder = name.startswith(encoder)
        number = _NUMBERED.search(name) if in_encoder else None
        is_below = (in_encoder and not layers) or name.startswith(_BELOW_LAYERS)
        if number is not None:
            ids[name] = int(number[1]) + 1
            layers = max(layers, 0 if name in unused else ids[name])
        elif id(parameter) in tables or "embedding" in name or is_below:
            ids[name] = 0
        else:
            ids[name] = -1
    return {name: layers + 1 if number < 0 else min(number, layers + 1) for name, number in ids.items()}


def hidden_matrices(model: PreTrainedModel) -> list[str]:
    """Return names of the weights that hidden states are multiplied by: of linear layers, except the decoder, also
    where it is tied to the embeddings."""
    weights = {id(module.weight) for module in _linear_layers(model) if min(module.weight.shape) > 1}
    others = _tables(model) | {id(module.weight) for module in _logit_layers(model)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights - others]


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    layers = [layer for layer in module.modules() if type(layer).__name__.endswith("Linear")]  # I-BERT has its own
    return cast(list[nn.Linear], layers)


def decoder_of(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer with a row of weights for each token. None if the head multiplies by the embeddings, such as
    that of DeBERTa with `legacy: false`, whose output embeddings are a hidden layer in transformers."""
    decoder = cast(nn.Linear | None, model.get_output_embeddings())
    return decoder if decoder is not None and len(decoder.weight) == model.config.get_text_config().vocab_size else None


def _logit_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the layers whose weights give the logits. MobileBERT has two: one is tied to its narrow embeddings."""
    second = model.cls.predictions.dense if model.config.model_type == "mobilebert" else None
    return [layer for layer in _linear_layers(model) if layer in (decoder_of(model), second)]


def _tables(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of lookup tables."""
    return {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}


def in_embeddings(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of lookup tables, and of others in modules called `embeddings`."""
    return _tables(model.base_model) | {
        id(parameter)
        for name, module in model.base_model.named_modules()
        if name.split(".")[-1] == "embeddings"
        for parameter in module.parameters()
    }


@dataclass(frozen=True)
class FlopsModel:
    """Factors of the FLOPs of a step, besides its tokens."""

    encoder_parameters: int
    hidden_size: int
    vocabulary: int
    decoder_width: int
    windows: tuple[int | None, ...]  # per layer: tokens in the local window, None for full attention

    @property
    def attention_ratio(self) -> float:
        """FLOPs of comparing two slots in attention, relative to a slot's linear layers. Kernels that compare
        all slots of a row do so in layers with a local window too."""
        return 2.0 * self.hidden_size * len(self.windows) / self.encoder_parameters

    def per_step(self, tokens: int, squared_lengths: int, predicted: int) -> float:
        """Count FLOPs of a step over `tokens` real tokens whose sequences' squared lengths sum to `squared_lengths`."""
        if tokens == 0:
            return 0.0
        mean_length = squared_lengths / tokens
        attended = sum(mean_length if window is None else min(window, mean_length) for window in self.windows)
        encoder = tokens * (6.0 * self.encoder_parameters + 12.0 * self.hidden_size * attended)
        return encoder + 6.0 * predicted * (self.vocabulary + self.hidden_size) * self.decoder_width


def flops_model(model: PreTrainedModel, unused: Collection[str] = ()) -> FlopsModel | None:
    """Count the parameters of a model that is not yet partitioned (ZeRO 3). None for a type whose config does not have
    the sizes that the formula needs, such as Perceiver, or has sizes of its own for each layer.

    unused: names of parameters that the model does not use."""
    config = model.config
    if config.is_heterogeneous or any(getattr(config, name, None) is None for name in _FLOPS_SIZES):
        return None
    in_encoder = set(map(id, model.base_model.parameters())) - in_embeddings(model)
    layers: int = config.num_hidden_layers
    layers_per_group = layers // (getattr(config, "num_hidden_groups", None) or layers)  # of ALBERT
    encoder = sum(
        p.numel() * (layers_per_group if "layer_groups" in name else 1)
        for name, p in model.named_parameters()
        if id(p) in in_encoder and name not in unused
    )
    decoder = [layer.weight for layer in _logit_layers(model)] or [model.get_input_embeddings().weight]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = 2 * getattr(config, "sliding_window", 0) + 1 if "sliding_attention" in kinds else 0
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    longformer_windows = getattr(config, "attention_window", None)  # half on either side
    return FlopsModel(
        encoder_parameters=encoder,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        decoder_width=sum(weight.numel() for weight in decoder) // config.vocab_size,
        windows=tuple(windows if longformer_windows is None else [width + 1 for width in longformer_windows]),
    )
