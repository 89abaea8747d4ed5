"""Counter-based random numbers and permutations: a value depends on a key and a counter, not on earlier draws (cf.
`jax.random`).

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) with the constants of Stafford's variant 13. All arithmetic is modulo 2^64.

A permutation of [0, n) has O(1) access and no table: a Feistel network permutes the smallest power-of-two domain that
holds n; values outside [0, n) are permuted again until they are inside ("cycle walking", Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). The domain is less than twice n, so that takes fewer than two passes on average.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, SplitMix64's increment


def mix(values: U64) -> U64:
    """A bijection of 64-bit words in which each output bit depends on all input bits; any shape."""
    shifted = values >> np.uint64(30)
    mixed = np.asarray(values ^ shifted)
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        mixed *= np.uint64(factor)
        shifted = np.right_shift(mixed, np.uint64(shift), out=np.asarray(shifted))
        mixed ^= shifted
    return mixed


def make_key(parts: Iterable[int | str]) -> int:
    """A 64-bit key from numbers and names; the same on every machine and in every version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode())


def fold_in(keys: U64 | int, values: NDArray[np.integer]) -> U64:
    """Derive a new key from each key and value, for independent streams. Shapes broadcast."""
    parents = np.asarray(keys, dtype=np.uint64)
    return mix(mix(values.astype(np.uint64) + _GOLDEN) ^ parents)


def random_bits(keys: U64, counters: NDArray[np.integer]) -> U64:
    """Random 64-bit words: word number `counter` of each key's SplitMix64 stream. Shapes broadcast."""
    return mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(bits: U64) -> NDArray[np.float64]:
    """Random words -> floats in [0, 1) with 53 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def randint(bits: U64, bound: int) -> NDArray[np.int64]:
    """Random words -> integers in [0, bound), bound < 2^32, by multiplication (Lemire 2019); bias < 2^-32 * bound."""
    return ((bits >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


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
