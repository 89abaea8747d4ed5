"""The tensors of a microbatch, and one rank's share of a global batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.batching.order import BatchSequences

IGNORED = -100  # label of the padding entries of `masked_positions`; torch's default `ignore_index`

_NO_COLUMNS = torch.empty(1, 0, dtype=torch.int64)


class Microbatch(NamedTuple):
    """B rows of W slots. Padding slots have segment 0, and in `cu_seqlens` they form sequences of their own (in a flat
    microbatch also empty ones)."""

    input_ids: torch.Tensor  # int64 [B, W], masked
    position_ids: torch.Tensor  # int64 [B, W], restarting with each sequence
    segments: torch.Tensor  # int32 [B, W], number of the slot's sequence, from 1; 0: padding
    cu_seqlens: torch.Tensor  # int32 [sequences + 1], the same as boundaries in the flattened slots
    masked_positions: torch.Tensor  # int64 [M], flattened slots whose token is predicted, then any
    labels: torch.Tensor  # int64 [M], the original token; IGNORED for padding entries
    # Of packed rows, the predicted slots by row; empty for other kinds. Q: the most of a row, rounded up.
    predicted_columns: torch.Tensor = _NO_COLUMNS  # int64 [B, Q], columns of a row's predicted slots, then zeros
    predicted_entries: torch.Tensor = _NO_COLUMNS[0]  # int64 [M], index of each position in the flattened columns


class RankBatch(NamedTuple):
    """One rank's share of one global batch. Counts are of this rank and include special tokens."""

    step: int
    microbatches: list[Microbatch]
    masked_tokens: int
    tokens: int
    squared_lengths: int  # sum of the squared sequence lengths, for attention FLOPs
    corpus_tokens: Sequence[int]  # tokens by corpus of the mixture
    origins: BatchSequences  # this rank's sequences; entry n is segment n + 1 of its microbatches
    fingerprint: int  # hash of the whole global batch's sequences; equal on all ranks


class FlatRankBatch(NamedTuple):
    """A RankBatch with all tensors in one array: a worker sends one, and a rank pins one block of memory."""

    data: NDArray[np.uint8]  # by field, then by microbatch
    fields: list[tuple[int, torch.dtype, list[list[int]]]]  # number of the field, and the shape in each microbatch
    batch: RankBatch  # without its microbatches


def flatten_batch(batch: RankBatch) -> FlatRankBatch:
    """Copy the tensors of a batch into an array. Wide elements come first, so that all are aligned."""
    columns = list(enumerate(zip(*batch.microbatches, strict=True)))
    columns.sort(key=lambda column: -column[1][0].element_size())
    data = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensors in columns for tensor in tensors])
    fields = [(number, tensors[0].dtype, [list(tensor.shape) for tensor in tensors]) for number, tensors in columns]
    return FlatRankBatch(data.numpy(), fields, batch._replace(microbatches=[]))


def unflatten_batch(flat: FlatRankBatch, data: torch.Tensor) -> RankBatch:
    """Return the batch that was flattened. Its tensors are views of `data`, the flat data as a tensor."""
    columns: list[list[torch.Tensor]] = [[] for _ in flat.fields]
    start = 0
    for number, dtype, shapes in flat.fields:
        for shape in shapes:
            end = start + math.prod(shape) * dtype.itemsize
            columns[number].append(data[start:end].view(dtype).view(shape))
            start = end
    return flat.batch._replace(microbatches=[Microbatch(*tensors) for tensors in zip(*columns, strict=True)])
