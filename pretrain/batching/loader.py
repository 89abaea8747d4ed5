"""This rank's share of each global batch as tensors, made ahead of the device in worker processes.

1. The order names the sequences of global batch k.                     (the same on every rank)
2. Their lengths decide which rank and microbatch computes which.       (the same on every rank)
3. This rank reads, masks and lays out its own sequences only.

A batch is a function of its number, so the loader is a map from step to batch: torch's DataLoader gives order,
read-ahead and dead-worker detection, and starting at step k is starting at step k.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pretrain.batching.batch import IGNORED, Microbatch, RankBatch
from pretrain.batching.masking import Masker, MaskingRate, Runs
from pretrain.batching.order import BatchSequences, Order
from pretrain.batching.packing import deal, one_each, pack
from pretrain.batching.sequences import SequenceIndex
from pretrain.batching.vocabulary import Vocabulary
from pretrain.corpus.reader import Corpus
from pretrain.world import World

_MASKED_BUCKET = 64  # the number of predicted positions is rounded up to a multiple, so that kernels meet few shapes
_WIDTH_BUCKET = 16  # and so is the width of a padded microbatch
_GRACE_SECONDS = 40  # that a worker lives on after SIGTERM


@dataclass(frozen=True)
class Layout:
    """How sequences become the rows of a microbatch."""

    width: int  # W, slots in a window: the longest sequence, special tokens included
    microbatch_tokens: int  # slots that a rank computes at once
    packed: bool = True  # several sequences share a window; else one sequence a row, padded
    first_position: int = 0  # position id of a sequence's first token; padding_idx + 1 in the RoBERTa family

    @property
    def max_rows(self) -> int:
        return max(1, self.microbatch_tokens // self.width)


@dataclass(frozen=True)
class Source:
    """A corpus of the order, cut into sequences, and what masks them."""

    corpus: Corpus
    index: SequenceIndex
    masker: Masker


class _Texts(NamedTuple):
    """The text tokens [T] of S sequences, one after the other."""

    tokens: NDArray[np.int64]  # [T]
    shown: NDArray[np.int64]  # [T], masked
    chosen: NDArray[np.int64]  # [M] indices of the predicted tokens


@dataclass(frozen=True)
class BatchMaker(Dataset[RankBatch]):
    """Step -> RankBatch."""

    sources: tuple[Source, ...]  # by the order's corpus numbers
    order: Order
    vocabulary: Vocabulary
    layout: Layout
    world: World = field(default_factory=World)
    rate: MaskingRate | None = None  # by step; None: always the maskers' own

    def __getitem__(self, step: int) -> RankBatch:
        sequences = self.order.batch(step)
        text_lengths = np.empty_like(sequences.ids)
        for number, source in enumerate(self.sources):
            here = sequences.corpora == number
            text_lengths[here] = source.index.lengths(sequences.ids[here])
        lengths = text_lengths + self.vocabulary.num_special_tokens
        windows = pack(lengths, self.layout.width) if self.layout.packed else one_each(lengths)
        dealing = deal(lengths, windows, self.world.size, self.layout.max_rows)

        mine = np.flatnonzero(dealing.rank == self.world.rank)
        mine = mine[np.argsort(sequences.corpora[mine], kind="stable")]  # one corpus after the other
        own = BatchSequences(*(of_all[mine] for of_all in sequences))
        text_lengths, lengths = text_lengths[mine], lengths[mine]
        tokens, shown, chosen = self._texts(step, own, text_lengths)

        rows, width = dealing.rows, self.layout.width
        slots = dealing.microbatches * rows * width
        first_slot = ((dealing.microbatch * rows + dealing.row) * width + dealing.offset)[mine]
        text_slots = Runs(first_slot + len(self.vocabulary.prefix), text_lengths).members()
        all_slots = Runs(first_slot, lengths).members()
        input_ids = np.full(slots, self.vocabulary.pad_id, dtype=np.int64)
        input_ids[text_slots] = shown
        for place, token in enumerate(self.vocabulary.prefix):
            input_ids[first_slot + place] = token
        for place, token in enumerate(self.vocabulary.suffix):
            input_ids[first_slot + lengths - len(self.vocabulary.suffix) + place] = token
        position_ids = np.full(slots, self.layout.first_position, dtype=np.int64)
        position_ids[all_slots] += all_slots - np.repeat(first_slot, lengths)
        segments = np.zeros(slots, dtype=np.int32)
        segments[all_slots] = np.repeat(np.arange(1, len(mine) + 1, dtype=np.int32), lengths)

        shape = (dealing.microbatches, rows, width)
        masked_slots, labels = text_slots[chosen], tokens[chosen]
        by_slot = np.argsort(masked_slots, kind="stable")
        masked_slots, labels = masked_slots[by_slot], labels[by_slot]
        bounds = np.searchsorted(masked_slots, np.arange(dealing.microbatches + 1) * rows * width)
        microbatches = [
            self._microbatch(
                input_ids.reshape(shape)[number],
                position_ids.reshape(shape)[number],
                segments.reshape(shape)[number],
                masked_slots[low:high] - number * rows * width,
                labels[low:high],
            )
            for number, (low, high) in enumerate(pairwise(bounds))
        ]
        squares = int((lengths * lengths).sum())
        by_corpus = [int(lengths[own.corpora == number].sum()) for number in range(len(self.sources))]
        return RankBatch(
            step=step,
            microbatches=microbatches,
            masked_tokens=len(labels),
            tokens=sum(by_corpus),
            sequences=len(mine),
            squared_lengths=squares,
            corpus_tokens=by_corpus,
            origins=own,
            fingerprint=_fingerprint(sequences),
        )

    def _texts(self, step: int, sequences: BatchSequences, lengths: NDArray[np.int64]) -> _Texts:
        """Read and mask sequences that come one corpus after the other."""
        parts, before = [], 0
        for number, source in enumerate(self.sources):
            here = sequences.corpora == number
            of_source = BatchSequences(*(of_all[here] for of_all in sequences))
            masker = source.masker if self.rate is None else source.masker.at_rate(self.rate.at(step))
            starts = np.asarray(source.index.starts[of_source.ids])
            tokens = source.corpus.read(starts, lengths[here]).astype(np.int64)
            by_token = masker.policy.unit == "token"
            word_starts = None if by_token else source.corpus.read_word_starts(starts, lengths[here])
            shown, chosen = masker.mask(tokens, lengths[here], masker.keys(of_source), word_starts)
            parts.append(_Texts(tokens, shown, chosen + before))
            before += len(tokens)
        return _Texts(*map(np.concatenate, zip(*parts, strict=True)))

    def _microbatch(
        self,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        segments: NDArray[np.int32],
        masked: NDArray[np.int64],
        labels: NDArray[np.int64],
    ) -> Microbatch:
        if not self.layout.packed:  # cut the columns that are padding in every row
            used = int(np.flatnonzero(segments.any(axis=0)).max(initial=0)) + 1
            width = min(segments.shape[1], -(-used // _WIDTH_BUCKET) * _WIDTH_BUCKET)
            masked = masked // segments.shape[1] * width + masked % segments.shape[1]
            input_ids, position_ids, segments = input_ids[:, :width], position_ids[:, :width], segments[:, :width]
        fillers = max(1, -(-len(masked) // _MASKED_BUCKET)) * _MASKED_BUCKET - len(masked)
        flat = segments.reshape(-1)
        begins = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
        row_starts = np.arange(0, flat.size, segments.shape[1])
        boundaries = np.union1d(np.union1d(begins, row_starts), [flat.size])
        return Microbatch(
            input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
            position_ids=torch.from_numpy(np.ascontiguousarray(position_ids)),
            segments=torch.from_numpy(np.ascontiguousarray(segments)),
            cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
            masked_positions=torch.from_numpy(np.pad(masked, (0, fillers))),
            labels=torch.from_numpy(np.pad(labels, (0, fillers), constant_values=IGNORED)),
        )


def load(
    batches: Dataset[RankBatch], first: int, last: int | None, workers: int, pin_memory: bool = False
) -> Iterator[RankBatch]:
    """Batches first, first + 1, … up to `last` (exclusive; None: without end), made ahead by `workers` processes.

    With `workers` = 0 they are made in this process, when asked for.
    """
    steps = _Steps(first, last)
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_defer_sigterm,
        )
    )


@dataclass(frozen=True)
class _Steps:
    first: int
    last: int | None

    def __iter__(self) -> Iterator[int]:
        step = self.first
        while self.last is None or step < self.last:
            yield step
            step += 1


def _defer_sigterm(_worker: int) -> None:
    """A launcher that ends a run signals the whole process tree; the rank still needs batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _live_a_little_longer)


def _live_a_little_longer(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(_GRACE_SECONDS)  # whose signal ends the process


def _fingerprint(sequences: BatchSequences) -> int:
    digest = xxhash.xxh3_64()
    for numbers in sequences:
        digest.update(numbers.tobytes())
    return digest.intdigest() >> 1  # that fits a signed number of 64 bits
