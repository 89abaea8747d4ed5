"""Build one rank's share of a global batch as tensors.

1. The order gives the sequences of global batch k.                              (identical on every rank)
2. Packing or dealing assigns each to a rank, a microbatch and a place in a row. (identical on every rank)
3. This rank reads and masks its own sequences and lays them out in its microbatches.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from pretrain.batching.batch import IGNORED, Microbatch, RankBatch
from pretrain.batching.masking import MaskedText, Masker, MaskingSchedule, Ranges
from pretrain.batching.order import BatchSequences, SequentialOrder, ShuffledOrder
from pretrain.batching.packing import Assignment, MicrobatchLayout, RowKind, assign, next_multiple, round_up
from pretrain.batching.sequences import SequenceIndex
from pretrain.batching.vocabulary import Vocabulary
from pretrain.corpus.reader import Corpus
from pretrain.world import World

# Masked positions, and the predicted columns of a row, are padded to a multiple, so that kernels see few shapes.
_MASKED_BUCKET = 64
_COLUMNS_BUCKET = 8
# Flat microbatches are larger: their masked positions are padded by less than one part in 32, `cu_seqlens` by less than
# one part in 8.
_FLAT_PARTS = 32
_SEQUENCE_PARTS = 8


@dataclass(frozen=True)
class MaskedCorpus:
    """A corpus split into sequences, and the masker of its tokens."""

    corpus: Corpus
    index: SequenceIndex
    masker: Masker

    def read_and_mask(self, sequences: BatchSequences, lengths: NDArray[np.int64], rate: float | None) -> MaskedText:
        """Return the text of sequences with these text lengths [S], masked. `rate` None: the masker's."""
        starts = np.asarray(self.index.starts[sequences.ids])
        tokens = self.corpus.read(starts, lengths).astype(np.int64)
        word_starts = None if self.masker.masking.unit == "token" else self.corpus.read_word_starts(starts, lengths)
        return self.masker.mask(tokens, lengths, sequences, word_starts, rate)


class _OwnSequences(NamedTuple):
    """This rank's S sequences of a batch, grouped by corpus."""

    origins: BatchSequences
    lengths: NDArray[np.int64]  # [S] tokens, special tokens included
    text_lengths: NDArray[np.int64]  # [S] special tokens not counted
    first_slots: NDArray[np.int64]  # [S] in the rank's flattened microbatches


class _Slots(NamedTuple):
    """The N slots of a rank's microbatches, flattened."""

    input_ids: NDArray[np.int64]  # [N]
    position_ids: NDArray[np.int64]  # [N]
    segments: NDArray[np.int32]  # [N]
    text: NDArray[np.int64]  # [T] the slot of each text token


@dataclass(frozen=True)
class BatchMaker:
    """Step -> RankBatch."""

    corpora: tuple[MaskedCorpus, ...]  # indexed by the order's corpus numbers
    order: ShuffledOrder | SequentialOrder
    vocabulary: Vocabulary
    layout: MicrobatchLayout
    world: World = field(default_factory=World)
    masking_schedule: MaskingSchedule | None = None  # None: the rate of each masker

    def __getitem__(self, step: int) -> RankBatch:
        # 1. Which sequences? 2. Where is each computed? 3. This rank's share.
        return self.make_share(step, *self.assign(step))

    def make_share(
        self, step: int, sequences: BatchSequences, text_lengths: NDArray[np.int64], assignment: Assignment
    ) -> RankBatch:
        """Make this rank's share of a global batch; the arguments after `step` are the result of `assign`."""
        own = self._own(sequences, text_lengths, assignment)
        text = self._read_and_mask(step, own)
        slots = self._fill_slots(own, text, assignment)
        digest = xxhash.xxh3_64_intdigest(np.concatenate(sequences).tobytes())
        tokens = [int(own.lengths[own.origins.corpora == number].sum()) for number in range(len(self.corpora))]
        return RankBatch(
            step=step,
            microbatches=self._microbatches(slots, text, assignment),
            masked_tokens=len(text.masked),
            tokens=sum(tokens),
            squared_lengths=int((own.lengths * own.lengths).sum()),
            corpus_tokens=tokens,
            origins=own.origins,
            fingerprint=digest >> 1,  # fits a signed 64-bit integer
        )

    def assign(self, step: int) -> tuple[BatchSequences, NDArray[np.int64], Assignment]:
        """Return the sequences of the global batch, their text lengths [S], and where each is computed."""
        sequences = self.order.batch(step)
        text_lengths = np.empty_like(sequences.ids)
        for number, corpus in enumerate(self.corpora):
            selected = np.flatnonzero(sequences.corpora == number)
            text_lengths[selected] = corpus.index.lengths(sequences.ids[selected])
        lengths = text_lengths + self.vocabulary.num_special_tokens
        return sequences, text_lengths, assign(lengths, self.world.size, self.layout)

    def _own(self, sequences: BatchSequences, text_lengths: NDArray[np.int64], assignment: Assignment) -> _OwnSequences:
        own = np.flatnonzero(assignment.rank == self.world.rank)
        own = own[np.argsort(sequences.corpora[own], kind="stable")]
        origins, own_lengths = sequences.select(own), text_lengths[own]
        lengths = own_lengths + self.vocabulary.num_special_tokens
        return _OwnSequences(origins, lengths, own_lengths, assignment.first_slots(own))

    def _read_and_mask(self, step: int, own: _OwnSequences) -> MaskedText:
        rate = None if self.masking_schedule is None else self.masking_schedule.at(step)
        texts, before = [], 0
        for number, corpus in enumerate(self.corpora):
            selected = own.origins.corpora == number
            text = corpus.read_and_mask(own.origins.select(selected), own.text_lengths[selected], rate)
            texts.append(text._replace(masked=text.masked + before))
            before += len(text.tokens)
        return MaskedText(*map(np.concatenate, zip(*texts, strict=True)))

    def _fill_slots(self, own: _OwnSequences, text: MaskedText, assignment: Assignment) -> _Slots:
        prefix, suffix = self.vocabulary.prefix, self.vocabulary.suffix
        count = assignment.bounds[-1]
        text_slots = Ranges(own.first_slots + len(prefix), own.text_lengths).indices()
        all_slots = Ranges(own.first_slots, own.lengths).indices()

        input_ids = np.full(count, self.vocabulary.pad_id, dtype=np.int64)
        input_ids[text_slots] = text.inputs
        for place, token in enumerate(prefix):
            input_ids[own.first_slots + place] = token
        for place, token in enumerate(suffix):
            input_ids[own.first_slots + own.lengths - len(suffix) + place] = token

        position_ids = np.full(count, self.layout.first_position, dtype=np.int64)
        position_ids[all_slots] += all_slots - np.repeat(own.first_slots, own.lengths)
        segments = np.zeros(count, dtype=np.int32)
        segments[all_slots] = np.repeat(np.arange(1, len(own.lengths) + 1, dtype=np.int32), own.lengths)
        return _Slots(input_ids, position_ids, segments, text_slots)

    def _microbatches(self, slots: _Slots, text: MaskedText, assignment: Assignment) -> list[Microbatch]:
        masked = slots.text[text.masked]
        labels = text.tokens[text.masked]
        by_slot = np.argsort(masked, kind="stable")
        masked, labels = masked[by_slot], labels[by_slot]

        bounds = assignment.bounds
        shapes = zip(assignment.rows, assignment.widths, strict=True)
        places = zip(shapes, pairwise(bounds), pairwise(np.searchsorted(masked, bounds)), strict=True)
        return [
            self._microbatch(slots, shape, slice(start, end), masked[low:high] - start, labels[low:high])
            for shape, (start, end), (low, high) in places
        ]

    def _microbatch(
        self, slots: _Slots, shape: tuple[int, int], place: slice, masked: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> Microbatch:
        """Make one of `shape` [B, W] from its place in the slots. `masked` [M] are slots of it, flattened."""
        segments = slots.segments[place].reshape(shape)
        if self.layout.kind == "flat":
            boundaries = _flat_boundaries(segments.reshape(-1), self.layout.max_seq_length)
        else:
            boundaries = _boundaries(segments)
        padding = padded_predictions(len(masked), self.layout.kind) - len(masked)
        return Microbatch(
            input_ids=torch.from_numpy(slots.input_ids[place].reshape(shape)),
            position_ids=torch.from_numpy(slots.position_ids[place].reshape(shape)),
            segments=torch.from_numpy(segments),
            cu_seqlens=torch.from_numpy(boundaries),
            masked_positions=torch.from_numpy(np.pad(masked, (0, padding))),
            labels=torch.from_numpy(np.pad(labels, (0, padding), constant_values=IGNORED)),
            **_predicted_by_row(masked, segments.shape, padding) if self.layout.kind == "packed" else {},
        )


def padded_predictions(masked: int, kind: RowKind) -> int:
    """Return M, the entries of `masked_positions` for this many masked slots."""
    return next_multiple(round_up(masked, _FLAT_PARTS) if kind == "flat" else masked, _MASKED_BUCKET)


def _predicted_by_row(masked: NDArray[np.int64], shape: tuple[int, ...], padding: int) -> dict[str, torch.Tensor]:
    """Locate the `masked` slots [M], sorted, in rows: fields of a Microbatch. `shape`: of the slots, [B, W]."""
    rows, columns = np.divmod(masked, shape[1])
    places = np.arange(len(masked)) - np.searchsorted(rows, rows)  # in the row
    width = next_multiple(int(places.max(initial=-1)) + 1, _COLUMNS_BUCKET)
    by_row = np.zeros((shape[0], width), dtype=np.int64)
    by_row[rows, places] = columns
    return {
        "predicted_columns": torch.from_numpy(by_row),
        "predicted_entries": torch.from_numpy(np.pad(rows * width + places, (0, padding))),
    }


def _boundaries(segments: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return `cu_seqlens`: the flattened slots at which a sequence, padding or a row begins, and the total."""
    flat = segments.reshape(-1)
    begins = np.ones(flat.size + 1, dtype=np.bool_)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:-1])
    begins[:: segments.shape[1]] = True
    return np.flatnonzero(begins).astype(np.int32)


def _flat_boundaries(segments: NDArray[np.int32], longest: int) -> NDArray[np.int32]:
    """Return `cu_seqlens` [N + 1] of a flat microbatch with `segments` [T], whose padding is at the end.

    Padding is split into parts of at most `longest` slots, which is the `max_seqlen` that flash attention is given. The
    last entries repeat T, so that N takes few values.
    """
    used = int(np.count_nonzero(segments))
    starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
    starts = np.append(starts, np.arange(used, len(segments), longest))
    bounds = np.full(round_up(len(starts), _SEQUENCE_PARTS) + 1, len(segments), dtype=np.int32)
    bounds[: len(starts)] = starts
    return bounds
