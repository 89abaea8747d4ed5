"""The tensors of a microbatch, and one rank's share of a global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pretrain.batching.order import BatchSequences

IGNORED = -100  # label of the padding entries of `masked_positions`; torch's default `ignore_index`


class Microbatch(NamedTuple):
    """B rows of W slots. Padding slots have segment 0, and in `cu_seqlens` they form sequences of their own."""

    input_ids: torch.Tensor  # int64 [B, W], masked
    position_ids: torch.Tensor  # int64 [B, W], restarting with each sequence
    segments: torch.Tensor  # int32 [B, W], number of the slot's sequence, from 1; 0: padding
    cu_seqlens: torch.Tensor  # int32 [sequences + 1], the same as boundaries in the flattened slots
    masked_positions: torch.Tensor  # int64 [M], flattened slots whose token is predicted
    labels: torch.Tensor  # int64 [M], the original token; IGNORED for padding entries


class RankBatch(NamedTuple):
    """One rank's share of one global batch. Counts are of this rank and include special tokens."""

    step: int
    microbatches: list[Microbatch]
    masked_tokens: int
    tokens: int
    sequences: int
    squared_lengths: int  # sum of the squared sequence lengths, for attention FLOPs
    corpus_tokens: Sequence[int]  # tokens by corpus of the mixture
    origins: BatchSequences  # this rank's sequences; entry n is segment n + 1 of its microbatches
    fingerprint: int  # hash of the whole global batch's sequences; equal on all ranks
