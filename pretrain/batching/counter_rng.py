"""Counter-based random numbers and permutations: a value depends on a key and a counter, not on earlier draws (cf.
`jax.random`).

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) with the constants of Stafford's variant 13. All arithmetic is modulo 2^64.

A permutation of [0, n) has O(1) access and no table of n entries: a Feistel network permutes the smallest power-of-two
domain that holds n; values outside [0, n) are permuted again until they are inside ("cycle walking", Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). The domain is less than twice n, so that takes fewer than two passes on
average. A round changes one half of the bits by a function of the other half, which has few values: they are computed
once and looked up.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, SplitMix64's increment


def mix(values: U64) -> U64:
    """Map 64-bit words by a bijection in which each output bit depends on all input bits; any shape."""
    shifted = values >> np.uint64(30)
    mixed = np.asarray(values ^ shifted)
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        mixed *= np.uint64(factor)
        shifted = np.right_shift(mixed, np.uint64(shift), out=np.asarray(shifted))
        mixed ^= shifted
    return mixed


def make_key(parts: Iterable[int | str]) -> int:
    """Return a 64-bit key from numbers and names; the same on every machine and in every version."""
    return xxhash.xxh3_64_intdigest("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode())


def fold_in(keys: U64 | int, values: NDArray[np.integer]) -> U64:
    """Derive a new key from each key and value, for independent streams. Shapes broadcast."""
    parents = np.asarray(keys, dtype=np.uint64)
    return mix(mix(values.astype(np.uint64) + _GOLDEN) ^ parents)


def random_bits(keys: U64, counters: NDArray[np.integer]) -> U64:
    """Return random 64-bit words: word number `counter` of each key's SplitMix64 stream. Shapes broadcast."""
    return mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(bits: U64) -> NDArray[np.float64]:
    """Convert random words to floats in [0, 1) with 53 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def randint(bits: U64, bound: int) -> NDArray[np.int64]:
    """Convert random words to integers in [0, bound), bound < 2^32, by multiplication (Lemire 2019).

    The bias is less than 2^-32 * bound."""
    return ((bits >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


_ROUNDS = 8
_BLOCK = 16384  # words that are mixed at once: they stay in the processor's cache
_TABLE_BITS = 16  # halves of at most so many bits are looked up instead of mixed; their tables take 4 MiB
_KEPT_TABLES = 256  # permutations; a mixture of so many corpora needs no new ones in each batch

_I64 = NDArray[np.int64]
_Round = Callable[[_I64], _I64]
"""Maps one half of words to the bits that change the other half."""


def permute(seed: int, epoch: int, indices: _I64, n: int) -> _I64:
    """Return the image of each of `indices` [I] (values in [0, n)) in the permutation of (seed, epoch)."""
    assert n >= 1
    rounds = _rounds(seed, epoch, _half_bits(n))
    blocks = np.array_split(indices, -(-len(indices) // _BLOCK) or 1)
    words = np.concatenate([_network(block, n, rounds) for block in blocks])
    while (outside := np.flatnonzero(words >= n)).size:
        words[outside] = _network(words[outside], n, rounds)
    return words


def permutations(seed: int, epochs: Sequence[int], n: int) -> _I64:
    """Return the whole permutations of several epochs, [epochs, n]: row e is `permute(seed, epochs[e], arange(n), n)`.

    `n`: a power of two, at most 2^32.
    """
    assert n >= 2
    assert n & (n - 1) == 0
    keys = np.array([_round_keys(seed, epoch) for epoch in epochs], dtype=np.uint64).reshape(-1, _ROUNDS)
    tables = [_table(keys[:, number, None], number, _half_bits(n)) for number in range(_ROUNDS)]
    words = np.broadcast_to(np.arange(n), (len(epochs), n))
    return _network(words, n, [_lookup_by_row(table) for table in tables])


def _round_keys(seed: int, epoch: int) -> list[int]:
    return [make_key(("permutation", seed, epoch, number)) for number in range(_ROUNDS)]


def _half_bits(n: int) -> tuple[int, int]:
    """Return the number of bits of the low and of the high half of the words below n."""
    bits = (n - 1).bit_length()
    return bits // 2, bits - bits // 2


@functools.lru_cache(_KEPT_TABLES)
def _rounds(seed: int, epoch: int, half_bits: tuple[int, int]) -> list[_Round]:
    """Return the rounds of a permutation's network. They are kept: the next batch has the same."""
    keys = _round_keys(seed, epoch)
    if max(half_bits) > _TABLE_BITS:
        return [functools.partial(_mixed, key, number, half_bits) for number, key in enumerate(keys)]
    return [_table(key, number, half_bits).take for number, key in enumerate(keys)]


def _mixed(key: U64 | int, number: int, half_bits: tuple[int, int], half: _I64) -> _I64:
    """Return the change of one half in round `number` for each value of the other: of the low half if the number is
    odd, else of the high half."""
    mask = (1 << half_bits[1 - number % 2]) - 1
    return (fold_in(key, half) & np.uint64(mask)).view(np.int64)


def _table(key: U64 | int, number: int, half_bits: tuple[int, int]) -> _I64:
    """Compute `_mixed` of all halves, in the last dimension."""
    return _mixed(key, number, half_bits, np.arange(1 << half_bits[number % 2]))


def _lookup_by_row(table: _I64) -> _Round:
    """Return a round that looks up each row of its halves in the table of that row."""
    first = np.arange(len(table))[:, None] * table.shape[1]
    return lambda half: table.take(half + first)


def _network(words: _I64, n: int, rounds: Iterable[_Round]) -> _I64:
    """Apply an unbalanced Feistel network: each round mixes one half of the bits into the other."""
    low_bits, _ = _half_bits(n)
    low, high = words & ((1 << low_bits) - 1), words >> low_bits
    for number, mixed in enumerate(rounds):
        if number % 2 == 0:
            high = high ^ mixed(low)
        else:
            low = low ^ mixed(high)
    return (high << low_bits) | low
