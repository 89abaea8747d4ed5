import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from pretrain.batching.batch import IGNORED
from pretrain.batching.masking import MaskingSchedule
from pretrain.batching.order import BatchSizes
from pretrain.world import World
from runs import soak

PAD, CLS, SEP = 0, 1, 2


def sequences_of(batches):
    """{text as the model sees it -> labels} of every sequence in these batches, with tokens restored."""
    found = []
    for batch in batches:
        for micro in batch.microbatches:
            ids, segments = micro.input_ids.reshape(-1), micro.segments.reshape(-1)
            real = micro.labels != IGNORED
            restored = ids.clone()
            restored[micro.masked_positions[real]] = micro.labels[real]
            masked = torch.zeros(len(ids), dtype=torch.bool)
            masked[micro.masked_positions[real]] = True
            for segment in segments.unique():
                if segment != 0:
                    where = segments == segment
                    found.append(
                        (tuple(restored[where].tolist()), tuple(ids[where].tolist()), tuple(masked[where].tolist()))
                    )
    return found


def by_unit(maker, unit):
    """The maker with another masking unit."""
    (source,) = maker.corpora
    masking = source.masker.masking.model_copy(update={"unit": unit})
    masker = dataclasses.replace(source.masker, masking=masking)
    return dataclasses.replace(maker, corpora=(dataclasses.replace(source, masker=masker),))


KINDS_AND_UNITS = (
    ("packed", "token"),
    ("padded", "token"),
    ("flat", "token"),
    ("packed", "word"),
    ("packed", "span"),
)


@pytest.mark.parametrize(
    ("world_size", "kind", "unit"),
    [
        *((world_size, *case) for world_size in (1, 2, 3, 8) for case in KINDS_AND_UNITS),
        (64, "packed", "span"),  # more ranks than sequences
        *soak(*((1024, *case) for case in KINDS_AND_UNITS)),
    ],
)
def test_a_global_batch_is_the_same_at_every_world_size(maker, world_size, kind, unit):
    """Catches sequences or masks that depend on the world size, and tokens lost or duplicated between ranks."""
    maker = by_unit(maker, unit)
    layout = dataclasses.replace(maker.layout, kind=kind)
    reference = sorted(sequences_of([maker[3]]))
    share = [dataclasses.replace(maker, layout=layout, world=World(rank, world_size))[3] for rank in range(world_size)]
    assert sorted(sequences_of(share)) == reference
    assert sum(batch.masked_tokens for batch in share) == maker[3].masked_tokens
    assert len({len(batch.microbatches) for batch in share}) == 1, "ranks with unequal numbers of microbatches"


def test_one_epoch_shows_every_token_once(maker, corpus):
    """Catches lost tokens end to end: index, order, packing and layout together, at two ranks."""
    order = dataclasses.replace(maker.order, positions=len(maker.corpora[0].index))
    tokens = []
    for rank in range(2):
        of_rank = dataclasses.replace(maker, order=order, world=World(rank, 2))
        for restored, _, _ in sequences_of(of_rank[step] for step in range(order.end)):
            assert restored[0] == CLS
            assert restored[-1] == SEP
            tokens += restored[1:-1]
    assert sorted(tokens) == sorted(corpus.stream.tolist())


def test_microbatch_layout(maker):
    """Catches positions that do not restart, masks on special or padding slots, and boundaries off by one."""
    batch = dataclasses.replace(maker, layout=dataclasses.replace(maker.layout, first_position=2))[0]
    for micro in batch.microbatches:
        assert micro.input_ids.shape == micro.position_ids.shape == micro.segments.shape == (4, 16)
        ids, positions, segments = (t.reshape(-1) for t in (micro.input_ids, micro.position_ids, micro.segments))
        bounds = micro.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 64
        for start, end in pairwise(bounds):
            assert len(segments[start:end].unique()) == 1
            assert start // 16 == (end - 1) // 16, "a sequence in two rows"
            if segments[start] != 0:
                assert positions[start:end].tolist() == list(range(2, 2 + end - start))
                assert ids[start] == CLS
                assert ids[end - 1] == SEP
            else:
                assert (ids[start:end] == PAD).all()
        real = micro.labels != IGNORED
        masked = micro.masked_positions[real]
        assert (segments[masked] != 0).all()
        assert not np.isin(micro.labels[real], [0, 1, 2, 3, 4]).any()
        assert len(micro.labels) % 64 == 0


@pytest.mark.parametrize("rate", [0.3, 1e-9])
def test_predicted_columns_of_packed_rows(maker, rate):
    """Catches a predicted slot in another row or column than its position, and microbatches without any."""
    batch = dataclasses.replace(maker, masking_schedule=MaskingSchedule((rate,), "stepped", steps=1))[0]
    assert (batch.masked_tokens > 0) == (rate == 0.3)
    for micro in batch.microbatches:
        rows, count = micro.predicted_columns.shape
        assert rows == len(micro.input_ids)
        assert count % 8 == 0
        real = micro.labels != IGNORED
        entries = micro.predicted_entries[real]
        slots = entries // count * micro.input_ids.shape[1] + micro.predicted_columns.flatten()[entries]
        assert slots.tolist() == micro.masked_positions[real].tolist()
        assert len(set(entries.tolist())) == len(entries)
        assert len(micro.predicted_entries) == len(micro.labels)


def flat(maker, microbatch_tokens=90):
    """The maker with flat microbatches."""
    layout = dataclasses.replace(maker.layout, kind="flat", microbatch_tokens=microbatch_tokens, first_position=2)
    return dataclasses.replace(maker, layout=layout)


def test_flat_microbatch_layout(maker):
    """Catches boundaries that are off, or longer than the longest sequence, of which flash attention would leave slots
    uncomputed; positions that do not restart; labels of other slots."""
    batches = [flat(maker)[step] for step in range(20)]
    for micro in (micro for batch in batches for micro in batch.microbatches):
        slots = micro.input_ids.numel()
        assert slots <= 90
        assert micro.input_ids.shape == micro.position_ids.shape == micro.segments.shape == (1, slots)
        ids, positions, segments = micro.input_ids[0], micro.position_ids[0], micro.segments[0]
        bounds = micro.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == slots
        padding = [(start, end) for start, end in pairwise(bounds) if start == end or segments[start] == 0]
        assert list(pairwise(bounds))[len(bounds) - 1 - len(padding) :] == padding, "padding is at the end"
        for start, end in pairwise(bounds):
            assert end - start <= 16
            if start == end:
                continue
            assert len(segments[start:end].unique()) == 1
            if segments[start] != 0:
                assert (segments == segments[start]).sum() == end - start
                assert positions[start:end].tolist() == list(range(2, 2 + end - start))
                assert (ids[start], ids[end - 1]) == (CLS, SEP)
            else:
                assert (ids[start:end] == PAD).all()
        assert (segments[micro.masked_positions[micro.labels != IGNORED]] != 0).all()


def test_few_shapes_of_flat_microbatches_occur(maker):
    """Catches slots, boundaries or masked positions whose numbers vary from step to step."""
    larger = dataclasses.replace(maker, order=dataclasses.replace(maker.order, sizes=BatchSizes(290)))
    batches = [flat(larger, 800)[step] for step in range(30)]
    micros = [micro for batch in batches for micro in batch.microbatches]
    for number in range(len(micros[0])):
        assert len({micro[number].shape for micro in micros}) <= 8
    assert all(len(micro.labels) % 64 == 0 for micro in micros)


@pytest.mark.parametrize("sequences", [1, 37])
def test_flat_shares_that_are_empty_or_small(maker, sequences):
    """Catches a rank without sequences that has no microbatch, or one of another shape than the others."""
    small = dataclasses.replace(flat(maker), order=dataclasses.replace(maker.order, sizes=BatchSizes(sequences)))
    share = [dataclasses.replace(small, world=World(rank, 40))[0] for rank in range(40)]
    assert sum(len(batch.origins.ids) for batch in share) == sequences
    assert len({micro.input_ids.shape for batch in share for micro in batch.microbatches}) == 1
    assert {len(batch.microbatches) for batch in share} == {1}


def test_word_starts_come_from_the_corpus(maker, corpus, monkeypatch):
    """Catches masks that ignore the corpus's word starts, or apply them to other tokens."""
    whole = by_unit(maker, "word")
    assert any(0 < sum(masked) < len(masked) - 2 for _, _, masked in sequences_of([whole[0]]))
    monkeypatch.setattr(
        type(corpus), "read_word_starts", lambda _corpus, _starts, lengths: np.zeros(lengths.sum(), bool)
    )
    shares = [sum(masked) / (len(masked) - 2) for _, _, masked in sequences_of([whole[0]])]
    assert set(shares) == {0.0, 1.0}, "each sequence is one word now"


def test_an_empty_share_still_has_its_microbatches(maker):
    """Catches a rank without sequences that skips backward and hangs the others in a collective."""
    small = dataclasses.replace(maker, order=dataclasses.replace(maker.order, sizes=BatchSizes(1)))
    share = [dataclasses.replace(small, world=World(rank, 3))[0] for rank in range(3)]
    assert sorted(len(batch.origins.ids) for batch in share) == [0, 0, 1]
    for batch in share:
        assert len(batch.microbatches) == 1
        assert batch.microbatches[0].labels.numel() > 0


def test_a_batch_knows_where_its_sequences_come_from(maker, corpus):
    """Catches a bad batch attributed to the wrong sequences, and ranks that cannot detect that their batches differ."""
    share = [dataclasses.replace(maker, world=World(rank, 3))[2] for rank in range(3)]
    for batch in share:
        for micro in batch.microbatches:
            ids, segments = micro.input_ids.reshape(-1), micro.segments.reshape(-1)
            real = micro.labels != IGNORED
            ids[micro.masked_positions[real]] = micro.labels[real]
            for segment in segments.unique()[segments.unique() != 0].tolist():
                sequence = batch.origins.ids[segment - 1]
                start, end = maker.corpora[0].index.starts[sequence : sequence + 2]
                assert ids[segments == segment].tolist() == [CLS, *corpus.stream[start:end].tolist(), SEP]
    assert sum(len(batch.origins.ids) for batch in share) == 37
    assert len({batch.fingerprint for batch in share}) == 1
    assert share[0].fingerprint != maker[3].fingerprint
    assert 0 <= share[0].fingerprint < 2**63
