"""Modules of transformers' models whose parts are computed together, in compiled layers on a GPU.

- Query, key and value: one product computes all three, and kernels of our own return one gradient for them. Three
  products take longer, their gradients are summed, and Inductor copies the gradients of rotary positions together. The
  weights are parameters of three modules where the model has three. They are concatenated in each pass, which is a
  thousandth of the product.
- The bias and GELU of the feed-forward layer: see `pretrain.modeling.bias_gelu`.
- Layer norms, dropout and residual connections: see `pretrain.modeling.fused_norm`.

Shapes: B rows, W slots, J = 3, H heads, D dimensions of a head.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from pretrain.modeling.attention import Packing, Rotation, qkv_attention
from pretrain.modeling.fast_gelu import is_compiled_in_16_bit

_Output = tuple[Tensor, Tensor | None]
_MAX_NORM_COLUMNS = 2048  # a kernel keeps sums of all columns in registers


def use_fused_modules(model: nn.Module) -> None:
    """Let the model's modules compute parts together: query, key and value where a microbatch's `Packing` prefers
    kernels of our own; in 16 bit on a GPU, bias and GELU, and layer norms with their residual connections. Other types
    of modules are not changed.

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
        qkv_BWJHD = _split(F.linear(hidden_BWD, weight, bias), self.attention_head_size)
        dropout = self.dropout.p if self.training else 0.0
        output_BWHD, _ = qkv_attention(
            qkv_BWJHD, None, packing=packing, scaling=self.scaling, dropout=dropout, sliding_window=None
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


def _fuses_norm(hidden_BWD: Tensor, norm: nn.Module) -> bool:
    fits = type(norm) is nn.LayerNorm and hidden_BWD.shape[-1] <= _MAX_NORM_COLUMNS
    return fits and is_compiled_in_16_bit(hidden_BWD)


class _BertOutput(nn.Module):
    """The layer after attention or feed-forward, dropout, residual connection and norm."""

    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm
    twice = False

    def forward(self, hidden_BWD: Tensor, residual_BWD: Tensor) -> Tensor | tuple[Tensor, ...]:
        probability = self.dropout.p if self.training else 0.0
        if not _fuses_norm(residual_BWD, self.LayerNorm) or probability == 1:
            return super().forward(hidden_BWD, residual_BWD)  # type: ignore[no-any-return]
        from pretrain.modeling.fused_norm import dropout_add_norm  # imports Triton

        bias = self.dense.bias
        values = F.linear(hidden_BWD, self.dense.weight, bias.detach())
        outputs = dropout_add_norm(values, bias, probability, residual_BWD, self.LayerNorm, self.twice)
        return outputs if self.twice else outputs[0]


class _BertAttentionOutput(_BertOutput):
    """Returns its output twice: for the feed-forward layer and for the residual connection."""

    twice = True


class _BertLayer(nn.Module):
    intermediate: nn.Module
    output: nn.Module
    chunk_size_feed_forward = property(lambda _: 0)  # transformers cannot split a tuple; the result is the same

    def feed_forward_chunk(self, attention_output: Tensor | tuple[Tensor, ...]) -> Tensor:
        if isinstance(attention_output, Tensor):
            return super().feed_forward_chunk(attention_output)  # type: ignore[no-any-return, misc]
        hidden_BWD, residual_BWD = attention_output
        return self.output(self.intermediate(hidden_BWD), residual_BWD)  # type: ignore[no-any-return]


class _ModernBertLayer(nn.Module):
    attn_norm: nn.Module
    attn: nn.Module
    mlp_norm: nn.LayerNorm
    mlp: nn.Module

    def forward(
        self,
        hidden_BWD: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        **options: Any,
    ) -> Tensor:
        if not _fuses_norm(hidden_BWD, self.mlp_norm):
            return super().forward(hidden_BWD, attention_mask, position_embeddings, **options)  # type: ignore[no-any-return]
        from pretrain.modeling.fused_norm import norm_beside_residual  # imports Triton

        if type(self.attn_norm) is nn.Identity:  # in the first layer
            normed_BWD = hidden_BWD
        else:
            normed_BWD, hidden_BWD = norm_beside_residual(hidden_BWD, self.attn_norm)  # type: ignore[arg-type]
        options |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        attended_BWD, _ = self.attn(normed_BWD, **options)
        normed_BWD, hidden_BWD = norm_beside_residual(hidden_BWD + attended_BWD, self.mlp_norm)
        return hidden_BWD + self.mlp(normed_BWD)  # type: ignore[no-any-return]


class _Intermediate(nn.Module):
    """The first feed-forward layer and its activation."""

    dense: nn.Linear
    intermediate_act_fn: nn.Module

    def forward(self, hidden_BWD: Tensor) -> Tensor:
        if type(self.intermediate_act_fn) is not GELUActivation or not is_compiled_in_16_bit(hidden_BWD):
            return super().forward(hidden_BWD)  # type: ignore[no-any-return]
        from pretrain.modeling.bias_gelu import bias_gelu  # imports Triton

        return bias_gelu(hidden_BWD, self.dense.weight, self.dense.bias)


_LIKE_BERT = (
    *("Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "Roberta", "RobertaPreLayerNorm", "XLMRoberta"),
    "XLMRobertaXL",
)
_POST_NORM = tuple(model for model in _LIKE_BERT if model not in ("RobertaPreLayerNorm", "XLMRobertaXL"))
_TYPES: dict[str, type[nn.Module]] = {
    **{f"{model}SelfAttention": _BertAttention for model in _LIKE_BERT},
    # RobertaPreLayerNorm's begins with a norm.
    **{f"{model}Intermediate": _Intermediate for model in _LIKE_BERT if model != "RobertaPreLayerNorm"},
    **{f"{model}SelfOutput": _BertAttentionOutput for model in _POST_NORM},
    **{f"{model}Output": _BertOutput for model in _POST_NORM},
    **{f"{model}Layer": _BertLayer for model in _POST_NORM},
    "ModernBertAttention": _ModernBertAttention,
    "ModernBertEncoderLayer": _ModernBertLayer,
}
