"""The tensors of a microbatch, and one rank's share of a global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pretrain.batching.order import BatchSequences

IGNORED = -100  # label of a predicted position that only fills the bucket


class Microbatch(NamedTuple):
    """B rows of W slots. Padding slots have segment 0 and, in cu_seqlens, spans of their own."""

    input_ids: torch.Tensor  # int64 [B, W], masked
    position_ids: torch.Tensor  # int64 [B, W], restarting with each sequence
    segments: torch.Tensor  # int32 [B, W], which sequence a slot belongs to
    cu_seqlens: torch.Tensor  # int32 [spans + 1], the same as boundaries in the flattened slots
    masked_positions: torch.Tensor  # int64 [M], flattened slots whose token is predicted
    labels: torch.Tensor  # int64 [M], the token; IGNORED where the position is a filler


class RankBatch(NamedTuple):
    """One rank's share of one global batch. Counts are of this rank, special tokens included."""

    step: int
    microbatches: list[Microbatch]
    masked_tokens: int
    tokens: int
    sequences: int
    squared_lengths: int  # sum of the sequences' squared lengths, for attention FLOPs
    corpus_tokens: Sequence[int]  # tokens by corpus of the mixture
    origins: BatchSequences  # this rank's sequences; number n is segment n + 1 of its microbatches
    fingerprint: int  # of the whole global batch's sequences, as this rank sees them
