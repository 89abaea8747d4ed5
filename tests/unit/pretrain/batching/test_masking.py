import dataclasses

import numpy as np
import pytest

from pretrain.batching.masking import Masker, MaskingPolicy
from pretrain.batching.order import BatchSequences

MASK, UNK = 4, 3
POLICY = MaskingPolicy(rate=0.15, mask_share=0.8, random_share=0.1)


@pytest.fixture
def masker(vocabulary):
    return Masker(vocabulary, POLICY, seed=11, corpus="corpus")


def sequences(ids, epoch=0):
    return BatchSequences(np.zeros(len(ids), np.int64), np.full(len(ids), epoch), np.asarray(ids))


def test_shares_are_those_of_the_policy(masker):
    """Catches a wrong threshold: 15 % chosen, of those 80 % [MASK], 10 % random, 10 % as they are (4 sigma)."""
    lengths = np.full(4000, 100)
    tokens = np.random.default_rng(0).integers(5, 2000, lengths.sum())
    shown, chosen = masker.mask(tokens, lengths, masker.keys(sequences(np.arange(4000))))
    before, after = tokens[chosen], shown[chosen]
    n = len(chosen)
    assert n / len(tokens) == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / len(tokens)) ** 0.5)
    assert (after == MASK).mean() == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / n) ** 0.5)
    assert (after == before).mean() == pytest.approx(0.1 + 0.1 / 4995, abs=4 * (0.1 * 0.9 / n) ** 0.5)
    others = np.delete(np.arange(len(tokens)), chosen)
    assert np.array_equal(tokens[others], shown[others])


def test_random_replacements_are_real_words_evenly_drawn(masker):
    """Catches replacements by special ids, and a draw that favours some of the vocabulary."""
    masker = dataclasses.replace(masker, policy=MaskingPolicy(0.5, 0.0, 1.0))
    lengths = np.full(5000, 100)
    shown, chosen = masker.mask(np.full(lengths.sum(), 5), lengths, masker.keys(sequences(np.arange(5000))))
    drawn = shown[chosen]
    assert drawn.min() >= 5
    counts = np.bincount(drawn - 5, minlength=4995)
    assert counts.min() > 15
    assert counts.max() < 100


def test_special_tokens_are_never_chosen(masker):
    """Catches masks on the unknown token, which teach nothing."""
    masker = dataclasses.replace(masker, policy=MaskingPolicy(0.9, 0.8, 0.1))
    tokens = np.tile([UNK, 7], 500)
    _, chosen = masker.mask(tokens, np.array([1000]), masker.keys(sequences([0])))
    assert (tokens[chosen] == 7).all()


def test_masks_depend_on_the_sequence_and_epoch_not_on_the_company(masker):
    """Catches masks that change with the rank, the microbatch or a restart, or stay the same in the next epoch."""
    lengths = np.array([40, 60, 80])
    tokens = np.random.default_rng(1).integers(5, 2000, lengths.sum())
    shown, _ = masker.mask(tokens, lengths, masker.keys(sequences([8, 3, 5])))
    alone, _ = masker.mask(tokens[40:100], lengths[1:2], masker.keys(sequences([3])))
    assert np.array_equal(shown[40:100], alone)
    next_epoch, _ = masker.mask(tokens[40:100], lengths[1:2], masker.keys(sequences([3], epoch=1)))
    assert not np.array_equal(next_epoch, alone)
    for changed in (
        dataclasses.replace(masker, seed=12),
        dataclasses.replace(masker, corpus="other"),
        dataclasses.replace(masker, stage=1),
    ):
        other, _ = changed.mask(tokens[40:100], lengths[1:2], changed.keys(sequences([3])))
        assert not np.array_equal(other, alone)


def test_a_higher_rate_keeps_the_masks_of_a_lower_one(masker):
    """Catches a rate that enters the key: a rate schedule must not redraw everything at each step."""
    tokens, lengths = np.full(1000, 9), np.array([1000])
    _, low = masker.mask(tokens, lengths, masker.keys(sequences([0])))
    higher = dataclasses.replace(masker, policy=MaskingPolicy(0.3, 0.8, 0.1))
    _, high = higher.mask(tokens, lengths, higher.keys(sequences([0])))
    assert set(low) < set(high)
