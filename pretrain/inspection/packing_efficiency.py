"""Packing efficiency of a corpus: tokens per computed slot at several maximum lengths of a sequence."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.packing import MicrobatchLayout, RowKind, assign
from pretrain.batching.sequences import split_documents
from pretrain.config import BatchConfig

MAX_SEQ_LENGTHS = (128, 512, 1024, 8192)
BATCHES = 8  # that are packed
BATCH_TOKENS = 2**19  # of each, about: as 4,096 sequences of 128
_LONGEST_SEQUENCES = 8  # that a microbatch holds, at least: with few, slots stay empty in flat ones
_BLOCK = 2**20  # sequences that are counted at once


@dataclass(frozen=True)
class PackingEfficiency:
    """The sequences of a corpus at one maximum length, special tokens included."""

    max_seq_length: int
    sequences: int  # of an epoch
    split_documents: float  # share of the documents that are longer than a sequence
    special_tokens: float  # share of the tokens
    filled: dict[RowKind, float]  # tokens per computed slot, special tokens included


def packing_efficiency(
    lengths: NDArray[np.int64], documents: NDArray[np.int64], max_seq_length: int, special_tokens: int, seed: int
) -> PackingEfficiency:
    """Split all documents, and pack some batches of their sequences, drawn by the seed, for one rank.

    Args:
        lengths: in tokens, [L].
        documents: how many have each length, [L].
        special_tokens: that are added to a sequence.
    """
    capacity = max_seq_length - special_tokens
    sequences = _sequence_lengths(lengths, documents, capacity)
    count = int(sequences.sum())
    tokens = int((lengths * documents).sum())
    random = np.random.default_rng(seed)
    size = BATCHES, max(1, BATCH_TOKENS * count // (tokens + special_tokens * count))
    batches = random.choice(capacity + 1, size, p=sequences / count) + special_tokens
    slots = max(BatchConfig().microbatch_tokens, _LONGEST_SEQUENCES * max_seq_length)
    layouts = [MicrobatchLayout(max_seq_length, slots, kind) for kind in ("padded", "packed", "flat")]
    return PackingEfficiency(
        max_seq_length=max_seq_length,
        sequences=count,
        split_documents=float(documents[lengths > capacity].sum() / documents.sum()),
        special_tokens=special_tokens * count / (tokens + special_tokens * count),
        filled={layout.kind: _filled(batches, layout) for layout in layouts},
    )


def _sequence_lengths(lengths: NDArray[np.int64], documents: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Count the sequences of each length in tokens, [capacity + 1]."""
    counts = -(-lengths // capacity)
    found = np.zeros(capacity + 1, dtype=np.int64)
    for block in np.array_split(np.arange(len(lengths)), -(-int(counts.sum()) // _BLOCK)):
        split, times = split_documents(lengths[block], capacity), np.repeat(documents[block], counts[block])
        np.add.at(found, split, times)
    return found


def _filled(batches: NDArray[np.int64], layout: MicrobatchLayout) -> float:
    """Return the filled share. `batches` [batches, S]: lengths of sequences, special tokens included."""
    slots = sum(assign(lengths, 1, layout).bounds[-1] for lengths in batches)
    return float(batches.sum() / slots)
