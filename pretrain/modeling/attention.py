"""Attention for packed windows, entered through `transformers.AttentionInterface`.

Several sequences lie side by side in a window, and a slot attends to its own sequence only. Which slots belong together
is told by keyword: `segments` (the sequence of each slot) and `cu_seqlens` (the same as boundaries in the flattened
slots). No attention mask is built by transformers, because the name is left out of its mask interface.

Three kernels compute the same thing:
- CPU: matmul, masked softmax, matmul over windows. Measured 3-5 times faster than scaled_dot_product_attention with a
  mask, nested tensors or a loop over sequences, as long as windows are short.
- CUDA, half precision, no attention dropout: `torch.nn.attention.varlen`, which never touches slots of two sequences.
- CUDA otherwise: scaled_dot_product_attention with a mask.

Shapes: B windows, W slots, H heads, D dimensions of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from pretrain.modeling.dropout import fast_dropout

PACKED = "deepcloze_packed"


def register_packed_attention() -> None:
    """Make `attn_implementation="deepcloze_packed"` known to transformers; must precede building the model."""
    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: nn.Module,
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, W, H, D].

    `sliding_window`: a slot sees those less than this many slots away, as transformers hands it to flash attention
    (ModernBERT: half its local window, plus one).
    """
    assert attention_mask is None, "transformers made a mask although the packed attention takes none"
    scaling = query_BHWD.shape[-1] ** -0.5 if scaling is None else scaling
    if not query_BHWD.is_cuda:
        return _window_attention(query_BHWD, key_BHWD, value_BHWD, segments, scaling, dropout, sliding_window), None
    if dropout == 0.0 and query_BHWD.dtype in (torch.float16, torch.bfloat16):
        return _varlen_attention(query_BHWD, key_BHWD, value_BHWD, cu_seqlens, scaling, sliding_window), None
    allowed = ~_out_of_sight(segments, sliding_window)
    output = F.scaled_dot_product_attention(query_BHWD, key_BHWD, value_BHWD, allowed, dropout, scale=scaling)
    return output.transpose(1, 2), None


def _out_of_sight(segments: Tensor, sliding_window: int | None) -> Tensor:
    """Which slots may not look at which: bool [B, 1, W, W]. Padding looks at padding, so that no row sees nothing."""
    hidden = segments[:, None, :, None] != segments[:, None, None, :]
    if sliding_window is not None:
        place = torch.arange(segments.shape[1], device=segments.device)
        hidden = hidden | ((place[:, None] - place[None, :]).abs() >= sliding_window)
    return hidden


def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    scores_BHWW = torch.matmul(query * scaling, key.transpose(-1, -2))
    scores_BHWW.masked_fill_(_out_of_sight(segments, sliding_window), torch.finfo(scores_BHWW.dtype).min)
    weights_BHWW = F.softmax(scores_BHWW, dim=-1)
    if dropout:
        weights_BHWW = fast_dropout(weights_BHWW, dropout)
    return torch.matmul(weights_BHWW, value).transpose(1, 2)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, width, size = query.shape
    # A window of (left, right) slots that may be seen on either side, the slot itself not counted; -1: all.
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    query_THD, key_THD, value_THD = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output_THD = varlen_attn(
        query_THD, key_THD, value_THD, cu_seqlens, cu_seqlens, width, width, scale=scaling, window_size=window
    )
    assert isinstance(output_THD, Tensor)
    return output_THD.view(batch, width, heads, size)
