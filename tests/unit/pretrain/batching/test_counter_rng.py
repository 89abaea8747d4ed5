import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching import counter_rng
from pretrain.batching.counter_rng import (
    _network,
    _rounds,
    fold_in,
    make_key,
    permutations,
    permute,
    randint,
    random_bits,
    uniform,
)
from runs import soak


def test_make_key_is_stable_across_versions():
    """Catches a change of the hash, which would change the masks and the order of every existing run."""
    assert make_key(("masks", 42, "abc", 0)) == 18245591027822071797
    assert make_key((1, "1")) != make_key(("1", 1)) != make_key(("11",))


def test_random_bits_depend_on_key_and_counter_only():
    """Catches hidden state: a word must not depend on the order of the draws or on what is drawn with it."""
    keys = fold_in(7, np.arange(10))
    together = random_bits(keys[:, None], np.arange(50)[None, :])
    assert together.shape == (10, 50)
    assert random_bits(keys[3:4], np.array([17]))[0] == together[3, 17]


def test_uniform_is_uniform_and_uncorrelated():
    """Catches a weak mixer: moments, neighbours along the counter, neighbours along the key."""
    sample = uniform(random_bits(fold_in(1, np.arange(1000))[:, None], np.arange(1000)[None, :]))
    assert sample.min() >= 0.0
    assert sample.max() < 1.0
    assert abs(sample.mean() - 0.5) < 2e-3
    assert abs(sample.var() - 1 / 12) < 1e-3
    for a, b in ((sample[:, 1:], sample[:, :-1]), (sample[1:], sample[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5e-3


def test_randint_covers_the_range_evenly():
    """Catches an off-by-one at either end and a biased reduction."""
    counts = np.bincount(randint(random_bits(fold_in(5, np.arange(1)), np.arange(100_000)), 10), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 9_500
    assert counts.max() < 10_500


@given(st.integers(1, 5000), st.integers(0, 2**31), st.integers(0, 1000))
def test_permute_is_a_permutation(n, seed, epoch):
    """Catches a sequence visited twice or never in an epoch."""
    image = permute(seed, epoch, np.arange(n), n)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_epochs_and_seeds_differ():
    """Catches a key that leaves out the epoch or the seed."""
    first = permute(1, 0, np.arange(1000), 1000)
    for other in (permute(1, 1, np.arange(1000), 1000), permute(2, 0, np.arange(1000), 1000)):
        assert (first == other).sum() < 20


@pytest.mark.parametrize("n", [2, 8, 1024])
def test_several_permutations_at_once(n):
    """Catches keys of one epoch that are used for another."""
    each = [permute(5, epoch, np.arange(n), n) for epoch in range(3, 9)]
    assert np.array_equal(permutations(5, range(3, 9), n), each)


@pytest.mark.parametrize("n", [5, 16, 1024, *soak(1000)])
def test_every_place_is_equally_likely(n):
    """Catches a network with too few rounds: over many seeds and epochs, the image of an index must be uniform."""
    from scipy import stats

    if n in (16, 1024):
        images = np.concatenate([permutations(seed, range(200), n)[:, n // 2] for seed in range(20)])
    else:  # one by one, which takes longer
        images = np.array([permute(seed, 0, np.array([n // 2]), n)[0] for seed in range(4000)])
    counts = np.bincount(images * min(n, 20) // n, minlength=min(n, 20))
    assert stats.chisquare(counts, np.bincount(np.arange(n) * min(n, 20) // n) * len(images) / n).pvalue > 1e-4


def test_neighbours_do_not_stay_neighbours():
    """Catches a permutation that keeps local order, which would train on runs of one document."""
    image = permute(0, 0, np.arange(10_000), 10_000)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize("n", [3, 1000, 50_000_000, 2**32, 2**33, 10**12])
def test_tables_change_no_permutation(monkeypatch: pytest.MonkeyPatch, n: int):
    """Catches tables of halves that are looked up with the wrong half, key or mask, which would change the order of
    every existing run."""
    indices = np.random.default_rng(0).integers(0, n, 500)
    _rounds.cache_clear()
    looked_up = permute(3, 1, indices, n)
    monkeypatch.setattr(counter_rng, "_TABLE_BITS", -1)
    _rounds.cache_clear()
    assert np.array_equal(permute(3, 1, indices, n), looked_up)
    _rounds.cache_clear()


def test_a_large_mixture_needs_no_new_tables():
    """Catches tables that each batch of a mixture of 200 corpora computes again."""
    for _ in range(2):
        before = _rounds.cache_info().misses
        for seed in range(200):
            permute(seed, 0, np.arange(5), 1000)
    assert _rounds.cache_info().misses == before


def test_the_permutation_is_stable_across_versions():
    """Catches a change of the order of every existing run."""
    assert permute(1, 2, np.arange(5), 1000).tolist() == [22, 90, 518, 193, 973]
    assert permute(1, 2, np.arange(5), 10**12).tolist() == [
        908072790981,
        752437890326,
        182736826562,
        894512953229,
        89195464900,
    ]


def test_access_is_constant_time(monkeypatch: pytest.MonkeyPatch):
    """Catches a table behind the permutation: a slice of 10^12 indices costs as much as one of few."""
    sizes: list[int] = []

    def counted(words, n, keys):
        sizes.append(words.size)
        return _network(words, n, keys)

    monkeypatch.setattr(counter_rng, "_network", counted)
    image = permute(3, 0, np.arange(10**12 - 4096, 10**12), 10**12)
    assert 4096 <= sum(sizes) < 3 * 4096, "cycle walking takes less than two passes on average"
    assert len(np.unique(image)) == 4096
    assert image.max() < 10**12
