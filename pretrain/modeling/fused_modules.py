"""Modules of transformers' models whose parts are computed together, in compiled layers on a GPU.

- Query, key and value: one product computes all three, and kernels of our own return one gradient for them. Three
  products take longer, their gradients are summed, and Inductor copies the gradients of rotary positions together. The
  weights are parameters of three modules where the model has three. They are concatenated in each pass, which is a
  thousandth of the product.
- The bias and GELU of the feed-forward layer: see `pretrain.modeling.bias_gelu`.

Shapes: B rows, W slots, J = 3, H heads, D dimensions of a head.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from pretrain.modeling.attention import Packing, Rotation, qkv_attention
from pretrain.modeling.fast_gelu import supports_fast_gelu

_Output = tuple[Tensor, Tensor | None]


def use_fused_modules(model: nn.Module) -> None:
    """Let the model's modules compute parts together: query, key and value where a microbatch's `Packing` prefers
    kernels of our own, bias and GELU in 16 bit on a GPU. Other types of modules stay as they are.

    Modules inside these are not called then: call this for layers whose parameters are gathered together.
    """
    for module in model.modules():
        base = _TYPES.get(type(module).__name__)
        if base is not None:
            module.__class__ = _fused_type(base, type(module))  # type: ignore[arg-type]


@functools.cache
def _fused_type(base: type[nn.Module], module: type[nn.Module]) -> type[nn.Module]:
    """Return one type for all layers, which torch.compile therefore compiles once."""
    return type(f"Fused{module.__name__}", (base, module), {})


def _split(qkv: Tensor, head_size: int) -> Tensor:
    """Split to [B, W, J, H, D]."""
    return qkv.view(*qkv.shape[:2], 3, -1, head_size)


class _BertAttention(nn.Module):
    """Attention with a layer each for query, key and value."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_head_size: int
    scaling: float
    dropout: nn.Dropout

    def forward(self, hidden_BWD: Tensor, *inputs: Any, **options: Any) -> _Output:
        packing = options.get("packing")
        if not isinstance(packing, Packing) or not packing.prefers_varlen(None):
            return super().forward(hidden_BWD, *inputs, **options)  # type: ignore[no-any-return]
        layers = (self.query, self.key, self.value)
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        output_BWHD, _ = qkv_attention(
            _split(F.linear(hidden_BWD, weight, bias), self.attention_head_size),
            None,
            packing=packing,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            sliding_window=None,
        )
        return output_BWHD.flatten(2), None


class _ModernBertAttention(nn.Module):
    """Attention with one layer for query, key and value, and rotary positions."""

    Wqkv: nn.Linear
    Wo: nn.Linear
    out_drop: nn.Module
    head_dim: int
    attention_dropout: float
    sliding_window: int | None

    def forward(
        self, hidden_BWD: Tensor, position_embeddings: Rotation | None = None, *inputs: Any, **options: Any
    ) -> _Output:
        packing = options.get("packing")
        if not isinstance(packing, Packing) or not packing.prefers_varlen(self.sliding_window):
            return super().forward(hidden_BWD, position_embeddings, *inputs, **options)  # type: ignore[no-any-return]
        output_BWHD, _ = qkv_attention(
            _split(self.Wqkv(hidden_BWD), self.head_dim),
            position_embeddings,
            packing=packing,
            scaling=self.head_dim**-0.5,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
        )
        return self.out_drop(self.Wo(output_BWHD.flatten(2))), None


class _Intermediate(nn.Module):
    """The first feed-forward layer and its activation."""

    dense: nn.Linear
    intermediate_act_fn: nn.Module

    def forward(self, hidden_BWD: Tensor) -> Tensor:
        if type(self.intermediate_act_fn) is not GELUActivation or not supports_fast_gelu(hidden_BWD):
            return super().forward(hidden_BWD)  # type: ignore[no-any-return]
        from pretrain.modeling.bias_gelu import bias_gelu  # imports Triton

        return bias_gelu(hidden_BWD, self.dense.weight, self.dense.bias)


_LIKE_BERT = (
    *("Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "Roberta", "RobertaPreLayerNorm", "XLMRoberta"),
    "XLMRobertaXL",
)
_TYPES: dict[str, type[nn.Module]] = {
    **{f"{model}SelfAttention": _BertAttention for model in _LIKE_BERT},
    # RobertaPreLayerNorm's begins with a norm.
    **{f"{model}Intermediate": _Intermediate for model in _LIKE_BERT if model != "RobertaPreLayerNorm"},
    "ModernBertAttention": _ModernBertAttention,
}
