"""Which sequences make up global batch k: a pure function of (the corpora's numbers of sequences, seeds, weights, k).

1. Global batch k is the slice [S(k), S(k + 1)) of an endless stream of positions; S is a closed form in whole numbers.
2. A mixture gives each position to one of its corpora, block by block, in proportion to their shares.
3. Position p of a corpus's own stream is sequence `permute(seed, p // N, p mod N)` of epoch p // N.

Nothing else has a say: not the world size, not the microbatch, not what ran before; and batch 10^9 costs what batch 0
costs.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import make_key
from pretrain.batching.permutation import permute

_BLOCK = 1024  # positions among which a mixture's shares are kept; their order within is shuffled
_WHOLE = 1 << 32  # what the shares of a mixture add up to, about


class BatchSequences(NamedTuple):
    """The sequences of one global batch, in the order of the stream."""

    corpora: NDArray[np.int64]  # [S] which corpus of a mixture
    epochs: NDArray[np.int64]  # [S] which pass over that corpus
    ids: NDArray[np.int64]  # [S] which sequence of the corpus


class Order(Protocol):
    """Global batches by number."""

    def batch(self, step: int) -> BatchSequences:
        """Global batch number `step`, counted from 0."""
        ...


@dataclass(frozen=True)
class BatchSizes:
    """How many sequences the global batches of a stream hold, and so where each begins.

    Batches grow linearly over the first `warmup_steps` steps of the run, to `sequences`: that of step k holds about
    `sequences * (k + 1) / (warmup_steps + 1)`, and at least one.
    """

    sequences: int
    warmup_steps: int = 0
    first_step: int = 0  # of the run, which the stream begins with

    def start(self, step: int) -> int:
        """S(step): the position in the stream with which the batch of this step of the run begins."""
        warm = max(self.first_step, min(step, self.warmup_steps))  # the step up to which batches grow
        triangle = (warm * (warm + 1) - self.first_step * (self.first_step + 1)) // 2
        grown = -(-self.sequences * triangle // (self.warmup_steps + 1))
        return max(warm - self.first_step, grown) + (step - warm) * self.sequences

    def end(self, positions: int) -> int:
        """The step after the one whose batch holds the last of so many positions."""
        steps = range(self.first_step, self.first_step + positions + 1)  # each batch holds at least one
        return self.first_step + bisect_left(steps, positions, key=self.start)


@dataclass(frozen=True)
class CorpusStream:
    """One corpus, epoch after epoch, each in an order of its own."""

    sequences: int  # N, in the corpus
    seed: int

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the sequence at each of `positions` of this stream."""
        epochs, indices = np.divmod(positions, self.sequences)
        ids = np.empty_like(indices)
        for epoch in np.unique(epochs):
            within = epochs == epoch
            ids[within] = permute(self.seed, int(epoch), indices[within], self.sequences)
        return epochs, ids


@dataclass(frozen=True)
class ShuffledOrder:
    """The training order: every epoch of every corpus visits each of its sequences once; batches may straddle epochs.

    With several corpora, `shares` are their shares of the positions, relative to each other. Each corpus's own stream
    is read in its order and without gaps, so its epochs are those it would have alone.
    """

    corpora: tuple[CorpusStream, ...]
    sizes: BatchSizes
    positions: int | None = None  # the stream ends here; None: it is endless
    shares: tuple[float, ...] = (1.0,)

    @property
    def end(self) -> int | None:
        """The step after the last; the batch of the last may be short."""
        return None if self.positions is None else self.sizes.end(self.positions)

    def batch(self, step: int) -> BatchSequences:
        start, end = self.sizes.start(step), self.sizes.start(step + 1)
        positions = np.arange(start, end if self.positions is None else min(end, self.positions), dtype=np.int64)
        corpora, own = self._of_corpora(positions)
        epochs, ids = np.empty_like(own), np.empty_like(own)
        for number, corpus in enumerate(self.corpora):
            here = corpora == number
            epochs[here], ids[here] = corpus.at(own[here])
        return BatchSequences(corpora, epochs, ids)

    def _of_corpora(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The corpus that each position is given to, and the position in that corpus's own stream."""
        if len(self.corpora) == 1:
            return np.zeros_like(positions), positions
        corpora, own = np.empty_like(positions), np.empty_like(positions)
        seed = make_key(("mixture", *(corpus.seed for corpus in self.corpora)))
        blocks = positions // _BLOCK
        for block in np.unique(blocks).tolist():
            before = quotas(self.shares, block * _BLOCK)
            here = quotas(self.shares, (block + 1) * _BLOCK) - before
            of_slot = np.repeat(np.arange(len(here)), here)[permute(seed, block, np.arange(_BLOCK), _BLOCK)]
            of_own = np.empty_like(of_slot)
            for number, first in enumerate(before):
                slots = np.flatnonzero(of_slot == number)
                of_own[slots] = first + np.arange(len(slots))
            asked = blocks == block
            slots = positions[asked] - block * _BLOCK
            corpora[asked], own[asked] = of_slot[slots], of_own[slots]
        return corpora, own


def quotas(shares: Sequence[float], positions: int) -> NDArray[np.int64]:
    """How many of the first `positions` positions each corpus gets; no entry ever falls as `positions` grows.

    The last corpus gets its share of all, the one before it its share of what that leaves, and so on: each entry is
    within one of exact, times the number of corpora.
    """
    whole = [max(1, round(share / sum(shares) * _WHOLE)) for share in shares]
    counts = []
    for number in reversed(range(len(whole))):
        below = positions * sum(whole[:number]) // sum(whole[: number + 1])
        counts.append(positions - below)
        positions = below
    return np.array(counts[::-1], dtype=np.int64)


@dataclass(frozen=True)
class SequentialOrder:
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
        return BatchSequences(np.zeros_like(ids), np.zeros_like(ids), ids)
