import numpy as np

from pretrain.batching.counter_rng import fold_in, make_key, randint, random_bits, uniform


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
