"""MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4).

A document is the set of the hashes of its n-grams. Each set is hashed into bands: two sets of Jaccard similarity s
agree in a band of r rows with probability s^r. Sets that agree in a band are then compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pretrain.cleaning.arrays import is_first

IntegerT = TypeVar("IntegerT", bound=np.integer[Any])

_SEED = 1


@dataclass(frozen=True)
class Bands:
    """Groups of hash functions."""

    count: int
    rows: int  # hash functions of each


def choose_bands(threshold: float, hashes: int = 128, recall: float = 0.99) -> Bands:
    """Choose as many rows as possible, for few false candidates, such that similarity at the threshold is found with a
    probability of `recall`, with at most `hashes` hash functions."""
    for rows in range(hashes, 0, -1):
        # 1 - (1 - threshold^rows)^count >= recall
        count = 1 if threshold == 1 else math.ceil(math.log(1 - recall) / math.log1p(-(threshold**rows)))
        if rows * count <= hashes:
            return Bands(count, rows)
    raise ValueError(f"no bands for a threshold of {threshold}")


@dataclass(frozen=True)
class NgramSets:
    """Hashes of the n-grams of consecutive documents, at least one each. `ends`: where each document ends."""

    ngrams: NDArray[np.uint32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Sequence[NDArray[np.uint32]]) -> Self:
        ends = np.cumsum([len(ngrams) for ngrams in sets], dtype=np.int64)
        return cls(np.concatenate(sets) if sets else np.empty(0, np.uint32), ends)

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self.ngrams[self.ends[index] - self.size(index) : self.ends[index]]

    def size(self, index: int) -> int:
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))


def sketch(sets: NgramSets, bands: Bands) -> NDArray[np.uint64]:
    """Compute, for [bands, documents], a hash of the minimum hashes of each band. n-grams may be repeated."""
    keys = np.zeros((bands.count, len(sets.ends)), np.uint64)
    ngrams, starts = sets.ngrams.astype(np.uint64), np.concatenate([[0], sets.ends[:-1]])
    products = np.empty_like(ngrams)
    for number, (multiplier, offset, factor) in enumerate(_hash_functions(bands) if len(sets.ends) else ()):
        # Multiply-shift (Dietzfelbinger et al. 1997): the upper half of a product modulo 2^64.
        np.multiply(ngrams, multiplier, out=products)
        np.add(products, offset, out=products)
        keys[number // bands.rows] += (np.minimum.reduceat(products, starts) >> np.uint64(32)) * factor
    return keys


@lru_cache
def _hash_functions(bands: Bands) -> NDArray[np.uint64]:
    """Draw [bands * rows, 3]: multiplier, offset, and the factor of the minimum hash in the hash of the band."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    functions = generator.integers(0, 2**64, (3, bands.count * bands.rows), np.uint64, endpoint=False)
    functions[::2] |= np.uint64(1)
    return functions.T


def sorted_distinct(values: NDArray[IntegerT]) -> NDArray[IntegerT]:
    """Return the different values, sorted. For many integers, `np.unique` of NumPy 2.4 takes 100 times as long."""
    ordered = np.sort(values)
    return ordered[is_first(ordered)]


def jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    """Return the similarity of two sets of hashes, each of them distinct."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
