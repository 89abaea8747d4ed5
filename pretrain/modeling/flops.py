"""Floating-point operations (FLOPs) of a training step. Padding and recomputed activations do not count. The last layer
counts in full, although it computes predicted positions only (`pretrain.modeling.last_layer`).

Forward and backward, per real token:

    6 N_encoder  +  12 h sum over layers of s_eff  +  6 r (V h + h^2)

N_encoder: parameters outside the embeddings and the head, those that layers share (ALBERT) once for each layer;
s_eff = sum(s^2) / sum(s) over the sequences, at most the local window where a layer has one; r: the fraction of tokens
that are predicted; h: hidden size; V: vocabulary size.
(Kaplan et al. 2020, section 2.1, with attention inside each sequence only.)
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class FlopsModel:
    """What the FLOPs of a step depend on, besides its tokens."""

    encoder_parameters: int
    hidden_size: int
    vocabulary: int
    windows: tuple[int | None, ...]  # per layer: tokens in the local window, None for full attention

    @property
    def attention_ratio(self) -> float:
        """FLOPs of comparing two slots in attention, relative to those of a slot's linear layers. Kernels that compare
        all slots of a row do so in layers with a local window too."""
        return 2.0 * self.hidden_size * len(self.windows) / self.encoder_parameters

    def per_step(self, tokens: int, squared_lengths: int, predicted: int) -> float:
        """FLOPs of a step over `tokens` real tokens whose sequences' squared lengths sum to `squared_lengths`."""
        if tokens == 0:
            return 0.0
        mean_length = squared_lengths / tokens
        attended = sum(mean_length if window is None else min(window, mean_length) for window in self.windows)
        encoder = tokens * (6.0 * self.encoder_parameters + 12.0 * self.hidden_size * attended)
        return encoder + 6.0 * predicted * (self.vocabulary * self.hidden_size + self.hidden_size**2)


def flops_model(model: PreTrainedModel) -> FlopsModel | None:
    """Count the parameters of a model that is not yet partitioned (ZeRO 3). None for a type whose config does not have
    the sizes that the formula needs, such as Perceiver, or has sizes of its own for each layer."""
    config = model.config
    if getattr(config, "is_heterogeneous", False) or any(getattr(config, name, None) is None for name in _SIZES):
        return None
    embeddings = {
        id(module) for name, module in model.base_model.named_modules() if name.split(".")[-1] == "embeddings"
    }
    in_embeddings = {
        id(parameter)
        for module in model.base_model.modules()
        if id(module) in embeddings
        for parameter in module.parameters()
    }
    layers: int = config.num_hidden_layers
    layers_per_group = layers // (getattr(config, "num_hidden_groups", None) or layers)  # of ALBERT
    encoder = sum(
        p.numel() * (layers_per_group if "layer_groups" in name else 1)
        for name, p in model.base_model.named_parameters()
        if id(p) not in in_embeddings
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = 2 * getattr(config, "sliding_window", 0) + 1 if "sliding_attention" in kinds else 0
    return FlopsModel(
        encoder_parameters=encoder,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )
