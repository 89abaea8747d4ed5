"""A keyed permutation of [0, n) with O(1) access and without a table.

A Feistel network permutes the smallest power-of-two domain that holds n; values outside [0, n) are permuted again until
they are inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The
domain is less than twice n, so that takes fewer than two passes on average.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64, fold_in, make_key

_ROUNDS = 8
_BLOCK = 16384  # words that are mixed at once: they stay in the processor's cache


def permute(seed: int, epoch: int, indices: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The image of each of `indices` [I] (values in [0, n)) in the permutation of (seed, epoch)."""
    assert n >= 1
    if n == 1:
        return np.zeros_like(indices)
    keys = _round_keys(seed, epoch)
    blocks = np.array_split(indices.astype(np.uint64), -(-len(indices) // _BLOCK) or 1)
    words = np.concatenate([_network(block, n, keys) for block in blocks])
    while (outside := np.flatnonzero(words >= n)).size:
        words[outside] = _network(words[outside], n, keys)
    return words.astype(np.int64)


def permutations(seed: int, epochs: Sequence[int], n: int) -> NDArray[np.int64]:
    """The whole permutations of several epochs, [epochs, n]: row e is `permute(seed, epochs[e], arange(n), n)`.

    `n`: a power of two.
    """
    assert n >= 2
    assert n & (n - 1) == 0
    words = np.arange(n, dtype=np.uint64)[None]
    keys = np.array([_round_keys(seed, epoch) for epoch in epochs], dtype=np.uint64)
    blocks = np.array_split(keys, len(epochs) * n // _BLOCK or 1)
    return np.concatenate([_network(words, n, block.T[..., None]) for block in blocks]).astype(np.int64)


def _round_keys(seed: int, epoch: int) -> list[int]:
    return [make_key(("permutation", seed, epoch, round_)) for round_ in range(_ROUNDS)]


def _network(words: U64, n: int, keys: Iterable[int | U64]) -> U64:
    """An unbalanced Feistel network: each round mixes one half of the bits into the other. Words and keys broadcast."""
    low_bits = (n - 1).bit_length() // 2
    high_bits = (n - 1).bit_length() - low_bits
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    low, high = words & low_mask, words >> np.uint64(low_bits)
    for round_, key in enumerate(keys):
        if round_ % 2 == 0:
            high = (high ^ fold_in(key, low)) & high_mask
        else:
            low = (low ^ fold_in(key, high)) & low_mask
    return (high << np.uint64(low_bits)) | low
