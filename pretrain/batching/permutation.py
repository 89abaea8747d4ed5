"""A keyed permutation of [0, n) with O(1) access and without a table.

A Feistel network permutes the smallest power-of-two domain that holds n; values outside [0, n) are permuted again until
they are inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The
domain is less than twice n, so that takes fewer than two passes on average.
"""

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64, fold_in, make_key

_ROUNDS = 8


def permute(seed: int, epoch: int, indices: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The image of each of `indices` (values in [0, n)) in the permutation of (seed, epoch); same shape."""
    assert n >= 1
    if n == 1:
        return np.zeros_like(indices)
    low_bits = (n - 1).bit_length() // 2
    high_bits = (n - 1).bit_length() - low_bits
    keys = [make_key(("permutation", seed, epoch, round_)) for round_ in range(_ROUNDS)]
    words = _network(indices.astype(np.uint64), low_bits, high_bits, keys)
    while (outside := np.flatnonzero(words >= n)).size:
        words[outside] = _network(words[outside], low_bits, high_bits, keys)
    return words.astype(np.int64)


def _network(words: U64, low_bits: int, high_bits: int, keys: list[int]) -> U64:
    """An unbalanced Feistel network: each round mixes one half (`low_bits` or `high_bits` wide) into the other."""
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    low, high = words & low_mask, words >> np.uint64(low_bits)
    for round_, key in enumerate(keys):
        if round_ % 2 == 0:
            high = (high ^ fold_in(key, low)) & high_mask
        else:
            low = (low ^ fold_in(key, high)) & low_mask
    return (high << np.uint64(low_bits)) | low
