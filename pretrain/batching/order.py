"""Which sequences make up global batch k: a pure function of (number of sequences, seed, k).

Training reads one endless stream of positions. Position p is sequence `permute(seed, p // N, p mod N)` of epoch p // N.
Global batch k is the slice [S(k), S(k + 1)) of the stream. Nothing else has a say: not the world size, not the
microbatch, not what ran before; and batch 10^9 costs what batch 0 costs.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.permutation import permute


class BatchSequences(NamedTuple):
    """The sequences of one global batch, in the order of the stream."""

    epochs: NDArray[np.int64]  # [S] which pass over the corpus
    ids: NDArray[np.int64]  # [S] which sequence of the corpus


class Order(Protocol):
    """Global batches by number."""

    def batch(self, step: int) -> BatchSequences:
        """Global batch number `step`, counted from 0."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """The training order: every epoch visits every sequence once, shuffled; batches may straddle two epochs."""

    sequences: int  # N, in the corpus
    seed: int
    batch_sequences: int
    epochs: float | None = None  # the stream ends here; None: it is endless

    @property
    def positions(self) -> int | None:
        """Length of the stream in sequences."""
        return None if self.epochs is None else max(1, round(self.epochs * self.sequences))

    @property
    def steps(self) -> int | None:
        """Global batches in the stream; the last may be short."""
        return None if self.positions is None else -(-self.positions // self.batch_sequences)

    def batch(self, step: int) -> BatchSequences:
        start, end = step * self.batch_sequences, (step + 1) * self.batch_sequences
        positions = np.arange(start, end if self.positions is None else min(end, self.positions), dtype=np.int64)
        epochs, indices = np.divmod(positions, self.sequences)
        ids = np.empty_like(indices)
        for epoch in np.unique(epochs):
            within = epochs == epoch
            ids[within] = permute(self.seed, int(epoch), indices[within], self.sequences)
        return BatchSequences(epochs, ids)


@dataclass(frozen=True)
class CorpusOrder:
    """The evaluation order: the corpus once, front to back."""

    sequences: int
    batch_sequences: int

    @property
    def steps(self) -> int:
        return -(-self.sequences // self.batch_sequences)

    def batch(self, step: int) -> BatchSequences:
        ids = np.arange(
            step * self.batch_sequences, min((step + 1) * self.batch_sequences, self.sequences), dtype=np.int64
        )
        return BatchSequences(np.zeros_like(ids), ids)
