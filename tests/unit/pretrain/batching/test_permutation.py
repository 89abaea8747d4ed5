import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pretrain.batching import permutation
from pretrain.batching.permutation import _network, permutations, permute


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


@pytest.mark.parametrize("n", [5, 16, 1000])
def test_every_place_is_equally_likely(n):
    """Catches a network with too few rounds: over many seeds, the image of an index must be uniform."""
    images = np.array([permute(seed, 0, np.array([n // 2]), n)[0] for seed in range(4000)])
    counts = np.bincount(images * min(n, 20) // n, minlength=min(n, 20))
    assert stats.chisquare(counts, np.bincount(np.arange(n) * min(n, 20) // n) * len(images) / n).pvalue > 1e-4


def test_neighbours_do_not_stay_neighbours():
    """Catches a permutation that keeps local order, which would train on runs of one document."""
    image = permute(0, 0, np.arange(10_000), 10_000)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.04


def test_access_is_constant_time(monkeypatch: pytest.MonkeyPatch):
    """Catches a table behind the permutation: a slice of 10^12 indices costs as much as one of few."""
    sizes: list[int] = []

    def counted(words, n, keys):
        sizes.append(words.size)
        return _network(words, n, keys)

    monkeypatch.setattr(permutation, "_network", counted)
    image = permute(3, 0, np.arange(10**12 - 4096, 10**12), 10**12)
    assert 4096 <= sum(sizes) < 3 * 4096, "cycle walking takes less than two passes on average"
    assert len(np.unique(image)) == 4096
    assert image.max() < 10**12
