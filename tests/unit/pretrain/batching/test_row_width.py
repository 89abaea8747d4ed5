"""The width of rows that hold several sequences."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.order import BatchSequences, BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.row_width import with_best_row_width
from pretrain.batching.sequences import SequenceIndex
from pretrain.world import World

LONGEST = 64
ATTENTION = 1 / 4608  # of BERT-base

MakerOf = Callable[..., BatchMaker]


@pytest.fixture
def maker_of(maker: BatchMaker) -> MakerOf:
    """Returns a function that makes batches of sequences with the given numbers of tokens, special ones included."""

    def make(lengths: NDArray[np.int64], sequences: int = 256, microbatch_tokens: int = 32 * LONGEST) -> BatchMaker:
        (masked,) = maker.corpora
        index = SequenceIndex(np.concatenate([[0], np.cumsum(lengths - maker.vocabulary.num_special_tokens)]))
        return replace(
            maker,
            corpora=(MaskedCorpus(masked.corpus, index, masked.masker),),
            order=ShuffledOrder((CorpusStream(len(index), seed=5),), BatchSizes(sequences)),
            layout=MicrobatchLayout(LONGEST, microbatch_tokens),
        )

    return make


def drawn(low: int, high: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(low, high, size=2000)


def slots(maker: BatchMaker, step: int = 0) -> int:
    *_, assignment = maker.assign(step)
    return int(assignment.bounds[-1])


def test_rows_are_wider_if_two_sequences_do_not_fit(maker_of: MakerOf) -> None:
    """Catches rows that stay a third empty where most sequences are longer than half a row."""
    maker = maker_of(drawn(35, 50))
    chosen = with_best_row_width(maker, range(100), 0, ATTENTION)
    assert chosen.layout.row_width in (96, 112, 128)
    assert slots(chosen) < 0.8 * slots(maker)


@pytest.mark.parametrize("lengths", [drawn(60, 65), drawn(3, 20)], ids=["full", "short"])
def test_rows_that_are_full_stay_as_they_are(maker_of: MakerOf, lengths: NDArray[np.int64]) -> None:
    """Catches attention over wider rows that saves no slots."""
    assert with_best_row_width(maker_of(lengths), range(100), 0, ATTENTION).layout.row_width == LONGEST


@pytest.mark.parametrize(("warmup", "end", "first"), [(0, 99, 0), (40, 99, 40), (40, 50, 34), (40, 9, 0)])
def test_the_width_is_that_for_full_batches(maker_of: MakerOf, warmup: int, end: int, first: int) -> None:
    """Catches a width for the few sequences of the first batches of a warmup, with which the whole run is computed."""
    asked = []

    class Recorded(ShuffledOrder):
        def batch(self, step: int) -> BatchSequences:
            asked.append(step)
            return super().batch(step)

    maker = maker_of(drawn(35, 50), sequences=20)
    order = maker.order
    assert isinstance(order, ShuffledOrder)
    recorded = replace(maker, order=Recorded(order.corpora, order.sizes))
    with_best_row_width(recorded, range(end), warmup, ATTENTION)
    assert (min(asked), max(asked)) == (first, min(first + 16, end) - 1)


def test_expensive_attention_keeps_rows_narrow(maker_of: MakerOf) -> None:
    """Catches a choice by slots alone."""
    assert with_best_row_width(maker_of(drawn(35, 50)), range(100), 0, attention_ratio=1.0).layout.row_width == LONGEST


def test_a_row_is_not_wider_than_a_microbatch(maker_of: MakerOf) -> None:
    """Catches a microbatch that exceeds `batch.microbatch_tokens`, which the user chose to fit the device."""
    maker = maker_of(drawn(35, 50), microbatch_tokens=80)
    chosen = with_best_row_width(maker, range(100), 0, ATTENTION)
    assert chosen.layout.row_width == 80
    *_, assignment = chosen.assign(0)
    assert (assignment.rows * assignment.widths <= 80).all()


def test_ranks_choose_the_same_width(maker_of: MakerOf) -> None:
    """Catches a choice that depends on the rank: ranks would disagree on where sequences are computed."""
    maker = maker_of(drawn(20, 64), sequences=37)
    chosen = {
        with_best_row_width(replace(maker, world=World(rank, 3)), range(100), 0, ATTENTION).layout for rank in range(3)
    }
    assert len(chosen) == 1


def test_wide_rows_have_the_same_tokens_and_masks(maker_of: MakerOf) -> None:
    """Catches sequences that are lost, cut or masked differently in rows wider than the longest sequence."""
    narrow = maker_of(np.array([len(document) + 2 for document in _documents(maker_of)]), sequences=37)
    wide = replace(narrow, layout=replace(narrow.layout, wide_rows=112))
    assert _texts(narrow) == _texts(wide)


def _documents(maker_of: MakerOf) -> tuple[NDArray[np.int32], ...]:
    (masked,) = maker_of(np.array([3])).corpora
    documents: tuple[NDArray[np.int32], ...] = masked.corpus.documents_tokens  # type: ignore[attr-defined]
    return documents


def _texts(maker: BatchMaker) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Input ids and positions of each sequence of a batch."""
    found = []
    for microbatch in maker[0].microbatches:
        segments = microbatch.segments.reshape(-1)
        for number in segments.unique().tolist():
            if number:
                ids, positions = microbatch.input_ids.reshape(-1), microbatch.position_ids.reshape(-1)
                found.append((tuple(ids[segments == number].tolist()), tuple(positions[segments == number].tolist())))
    return sorted(found)
