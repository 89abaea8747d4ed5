"""The chunks in which a GPU computes logits, see `fused_cross_entropy`, which can only be imported where Triton is."""

import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**28  # 512 MiB in 16 bit; the products of fewer rows are slower
_ROW_TILE = 128  # a chunk has a multiple of this number of rows, and matrix products have whole tiles
_ALIGNMENT = 64  # columns of logits are padded to a multiple: matrix products of other widths are slow


def chunk_rows(vocabulary: int, logits: int = CHUNK_LOGITS) -> int:
    """Return C, how many rows are computed at once. `logits`: in a chunk, about."""
    return max(1, logits // vocabulary // _ROW_TILE) * _ROW_TILE


def padded_columns(vocabulary: int) -> int:
    """Return how many columns of the logits are computed."""
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT


def pad_vocabulary(parameter: Tensor) -> Tensor:
    """Return a decoder's weight [V, D] or bias [V] with zeros for the columns that are added. Differentiable."""
    padding = padded_columns(len(parameter)) - len(parameter)
    return F.pad(parameter, (0, 0) * (parameter.ndim - 1) + (0, padding)) if padding else parameter
