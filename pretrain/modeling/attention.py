"""Attention for packed rows, registered in `transformers.AttentionInterface`.

A packed row holds several sequences, and a slot attends to its own sequence only. The model passes the keyword
`packing` on, which says so. transformers builds no attention mask, because the name is not registered in its mask
interface.

Three kernels compute the same result:
- CPU: matmul, masked softmax, matmul over rows. Measured 3-5 times faster than scaled_dot_product_attention with a
  mask, nested tensors or a loop over sequences, as long as rows are short.
- CUDA, 16 bit, no attention dropout: `torch.nn.attention.varlen`, which skips pairs of slots of different sequences.
- CUDA otherwise: scaled_dot_product_attention with a mask.

Shapes: B rows, W slots, T = B · W, H heads, D dimensions of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from experiment.dropout import fast_dropout

PACKED = "deepcloze_packed"


class Packing:
    """Which slots of a microbatch attend to each other. Masks are computed once for all layers.

    Padding attends to padding, so that each softmax has something to sum over.
    """

    def __init__(self, segments: Tensor, cu_seqlens: Tensor) -> None:
        """As in a `pretrain.batching.batch.Microbatch`."""
        self._segments = segments
        self.cu_seqlens = cu_seqlens
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def blocked(self, sliding_window: int | None) -> Tensor:
        """bool [B, 1, W, W]: True where a slot must not attend to another."""
        blocked = self._segments[:, None, :, None] != self._segments[:, None, None, :]
        if sliding_window is not None:
            slot = torch.arange(self._segments.shape[1], device=self._segments.device)
            blocked = blocked | ((slot[:, None] - slot[None, :]).abs() >= sliding_window)
        return blocked

    def bias(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, W, W], to be added to scores: 0, or the least number where a slot must not attend to another."""
        key = (sliding_window, dtype)
        if key not in self._biases:
            blocked = self.blocked(sliding_window)
            self._biases[key] = torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
        return self._biases[key]


def register_packed_attention() -> None:
    """Register `attn_implementation="deepcloze_packed"`; call before a model switches to it."""
    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: nn.Module,
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, W, H, D]. transformers dictates the signature.

    `sliding_window`: a slot attends to slots less than this many slots away, as in transformers' flash attention
    (ModernBERT: half its local window, plus one).
    """
    assert attention_mask is None, "transformers built a mask, which the packed attention does not use"
    scaling = query_BHWD.shape[-1] ** -0.5 if scaling is None else scaling
    if not query_BHWD.is_cuda:
        bias = packing.bias(sliding_window, query_BHWD.dtype)
        return _matmul_attention(query_BHWD, key_BHWD, value_BHWD, bias, scaling, dropout), None
    if dropout == 0.0 and query_BHWD.dtype in (torch.float16, torch.bfloat16):
        return _varlen_attention(query_BHWD, key_BHWD, value_BHWD, packing.cu_seqlens, scaling, sliding_window), None
    allowed = ~packing.blocked(sliding_window)
    output = F.scaled_dot_product_attention(query_BHWD, key_BHWD, value_BHWD, allowed, dropout, scale=scaling)
    return output.transpose(1, 2), None


def _matmul_attention(
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    bias: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    scores_BHWW = torch.matmul(query_BHWD * scaling, key_BHWD.transpose(-1, -2)).add_(bias)
    weights_BHWW = F.softmax(scores_BHWW, dim=-1)
    if dropout:
        weights_BHWW = fast_dropout(weights_BHWW, dropout)
    return torch.matmul(weights_BHWW, value_BHWD).transpose(1, 2)


def _varlen_attention(
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    cu_seqlens: Tensor,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, width, dimensions = query_BHWD.shape
    # Slots attended to on the left and on the right, the slot itself not counted; -1: all.
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    query_THD, key_THD, value_THD = (
        tensor.transpose(1, 2).flatten(0, 1) for tensor in (query_BHWD, key_BHWD, value_BHWD)
    )
    output_THD = varlen_attn(
        query_THD, key_THD, value_THD, cu_seqlens, cu_seqlens, width, width, scale=scaling, window_size=window
    )
    assert isinstance(output_THD, Tensor)
    return output_THD.view(rows, width, heads, dimensions)
