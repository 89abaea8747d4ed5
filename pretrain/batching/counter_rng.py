"""Counter-based random numbers: a value depends on a key and a counter, not on earlier draws (cf. `jax.random`).

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) with the constants of Stafford's variant 13. All arithmetic is modulo 2^64.
"""

from collections.abc import Iterable

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
