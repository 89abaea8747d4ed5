"""The sequences of global batch k: a pure function of (sequences per corpus, seeds, mixture shares, k).

1. Global batch k is the slice [S(k), S(k + 1)) of an endless stream of positions; see `BatchSizes` for S.
2. A mixture assigns each position to one of its corpora, block by block, in proportion to their shares.
3. Position p of a corpus's own stream is sequence `permute(seed, p // N, p mod N)` of epoch p // N.

The order does not depend on world size, microbatch size or earlier batches, and batch 10^9 costs as much as batch 0.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import make_key, permutations, permute
from pretrain.schedule_config import Stage

_BLOCK = 1024  # positions in which a mixture has exact shares; they are shuffled inside
_SHARE_UNITS = 1 << 32  # resolution of the shares: they are rounded to multiples of 1 / this


class BatchSequences(NamedTuple):
    """The sequences of one global batch, in the order of the stream."""

    corpora: NDArray[np.int64]  # [S] number of the corpus in the mixture
    epochs: NDArray[np.int64]  # [S] number of the pass over that corpus
    ids: NDArray[np.int64]  # [S] number of the sequence in the corpus

    def select(self, selected: NDArray[np.integer | np.bool_]) -> Self:
        """Return some of the sequences, by index or by a mask [S]."""
        return type(self)(*(column[selected] for column in self))


@dataclass(frozen=True)
class BatchSizes:
    """The number of sequences of each global batch of a stream, and thus its start.

    Batch warmup: over the first `warmup_steps` steps of the run, batches grow linearly to `sequences`; the batch of
    step k has about `sequences * (k + 1) / (warmup_steps + 1)`, at least one.
    """

    sequences: int
    warmup_steps: int = 0
    first_step: int = 0  # step of the run from which these sizes apply
    first_position: int = 0  # S(first_step): positions that were read before it, with other sizes

    def start(self, step: int) -> int:
        """S(step): the position in the stream at which the batch of this step of the run starts; that of `first_step`
        before it."""
        step = max(step, self.first_step)
        warm = max(self.first_step, min(step, self.warmup_steps))  # the last step with a growing batch
        triangle = (warm * (warm + 1) - self.first_step * (self.first_step + 1)) // 2
        grown = -(-self.sequences * triangle // (self.warmup_steps + 1))
        return self.first_position + max(warm - self.first_step, grown) + (step - warm) * self.sequences

    def end(self, positions: int) -> int:
        """Return the first step of the run at whose start `positions` positions of the stream have been read."""
        warm = max(self.first_step, self.warmup_steps)
        left = positions - self.start(warm)
        if left > 0:
            return warm + -(-left // self.sequences)
        return self.first_step + bisect_left(range(self.first_step, warm), positions, key=self.start)


def stage_sizes(stages: Sequence[Stage], warmup_steps: int) -> list[tuple[int, BatchSizes]]:
    """Return the batch sizes of each stage, and the number of the stage that started the epochs which it reads.

    A stage of the length of the one before it has the same sequences, so it continues the epochs of that stage, and its
    batch sizes if they are the same. Any other starts new epochs. `warmup_steps`: see BatchSizes.
    """
    sizes: list[tuple[int, BatchSizes]] = []
    for number, stage in enumerate(stages):
        begun, own = number, BatchSizes(stage.sequences, warmup_steps, stage.first_step)
        if number and stage.max_seq_length == stages[number - 1].max_seq_length:
            begun, before = sizes[-1]
            is_same = stage.sequences == before.sequences
            own = before if is_same else replace(own, first_position=before.start(stage.first_step))
        sizes.append((begun, own))
    return sizes


@dataclass(frozen=True)
class CorpusStream:
    """An endless stream of one corpus, shuffled anew in each epoch."""

    sequences: int  # N, sequences in the corpus
    seed: int

    def at(self, positions: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (epochs, sequence ids) at positions of this stream, [positions]."""
        epochs, ids = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        filled = 0
        while filled < len(positions):
            epoch, first = divmod(positions[filled], self.sequences)
            end = filled + min(len(positions) - filled, self.sequences - first)
            indices = np.arange(first, first + end - filled)
            epochs[filled:end], ids[filled:end] = epoch, permute(self.seed, epoch, indices, self.sequences)
            filled = end
        return epochs, ids


@dataclass(frozen=True)
class ShuffledOrder:
    """The training order: each epoch of a corpus visits each of its sequences once; batches may straddle epochs.

    With several corpora, `shares` are their relative shares of the positions. A corpus's own stream is read in order
    and without gaps, so its epochs are the same as without the other corpora.
    """

    corpora: tuple[CorpusStream, ...]
    sizes: BatchSizes
    positions: int | None = None  # the length of the stream; None: endless
    shares: tuple[float, ...] = (1.0,)

    @property
    def end(self) -> int | None:
        """The step after the last, whose batch may be smaller; None: endless."""
        return None if self.positions is None else self.sizes.end(self.positions)

    def start(self, step: int) -> int:
        """Return the position at which the batch of this step starts: how many positions the steps before it read."""
        start = self.sizes.start(step)
        return start if self.positions is None else min(start, self.positions)

    def batch(self, step: int) -> BatchSequences:
        """Return the global batch of this step, counted from 0."""
        start, end = self.sizes.start(step), self.start(step + 1)
        if len(self.corpora) == 1:
            return BatchSequences(np.zeros(end - start, dtype=np.int64), *self.corpora[0].at(range(start, end)))
        corpora, before = self._split_by_corpus(start, end)
        epochs, ids = np.empty_like(corpora), np.empty_like(corpora)
        for number, corpus in enumerate(self.corpora):
            selected = np.flatnonzero(corpora == number)
            first = int(before[number])
            epochs[selected], ids[selected] = corpus.at(range(first, first + len(selected)))
        return BatchSequences(corpora, epochs, ids)

    def positions_by_corpus(self, positions: int) -> NDArray[np.int64]:
        """Return how many of the first `positions` positions each corpus gets."""
        return self._split_by_corpus(positions, positions)[1]

    def _split_by_corpus(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the corpora of the positions [start, end) of a mixture, [end - start], and how many positions before
        `start` each corpus has."""
        seed = make_key(("mixture", *(corpus.seed for corpus in self.corpora)))
        blocks = range(start // _BLOCK, -(-end // _BLOCK))
        before = np.array([quotas(self.shares, block * _BLOCK) for block in (*blocks, blocks.stop)])
        of_block = np.repeat(np.tile(np.arange(len(self.corpora)), len(blocks)), np.diff(before, axis=0).reshape(-1))
        shuffle = permutations(seed, blocks, _BLOCK)
        corpora = np.take_along_axis(of_block.reshape(-1, _BLOCK), shuffle, axis=1).reshape(-1)
        skipped = start - blocks.start * _BLOCK
        in_first = np.bincount(corpora[:skipped], minlength=len(self.corpora))
        return corpora[skipped : end - blocks.start * _BLOCK], before[0] + in_first


def quotas(shares: Sequence[float], positions: int) -> NDArray[np.int64]:
    """Return how many of the first `positions` positions each corpus gets, monotonic in `positions`.

    The last corpus gets its share of all positions, the one before it its share of the remainder, and so on. Each count
    deviates from its exact share by less than the number of corpora.
    """
    units = [max(1, round(share / sum(shares) * _SHARE_UNITS)) for share in shares]
    counts = []
    for number in reversed(range(len(units))):
        below = positions * sum(units[:number]) // sum(units[: number + 1])
        counts.append(positions - below)
        positions = below
    return np.array(counts[::-1], dtype=np.int64)


@dataclass(frozen=True)
class SequentialOrder:
    """The evaluation order: one pass over the corpus, not shuffled."""

    sequences: int
    batch_sequences: int

    @property
    def steps(self) -> int:
        return -(-self.sequences // self.batch_sequences)

    def batch(self, step: int) -> BatchSequences:
        start, end = step * self.batch_sequences, min((step + 1) * self.batch_sequences, self.sequences)
        ids = np.arange(start, end, dtype=np.int64)
        return BatchSequences(np.zeros_like(ids), np.zeros_like(ids), ids)
