"""Near-duplicates by MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4).

1. A document is the set of its n-grams of normalized words. Workers hash each set into bands: two sets of Jaccard
   similarity s agree in a band of r rows with probability s^r.
2. Band by band, documents that agree are compared by the true similarity of their sets.
3. In the order of the collection, a document is dropped if it is similar to an earlier one that is kept.

So every dropped document has a kept one at or above the threshold: similarity is not passed on along chains, as it is
with connected components. One band is in memory at a time; the sets stay on disk.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.cleaning.words import normalized_words

_HASHES = 128  # at most, of all bands
_RECALL = 0.99  # of two documents at the threshold, in at least one band
_MEMBERS = 32  # representatives of a band's bucket that a document is compared with
_SEED = 1


@dataclass(frozen=True)
class Bands:
    """Groups of hash functions."""

    count: int
    rows: int  # hash functions of each


def choose_bands(threshold: float) -> Bands:
    """As many rows as possible, for few false candidates, such that similarity at the threshold is found in 99 % of
    cases with at most 128 hashes."""
    for rows in range(_HASHES, 0, -1):
        # 1 - (1 - threshold^rows)^count >= recall
        count = 1 if threshold == 1 else math.ceil(math.log(1 - _RECALL) / math.log1p(-(threshold**rows)))
        if rows * count <= _HASHES:
            return Bands(count, rows)
    raise ValueError(f"no bands for a threshold of {threshold}")


@dataclass(frozen=True)
class NgramSets:
    """Sets of hashed n-grams of consecutive documents. `ends`: where the set of each ends in `ngrams`."""

    ngrams: NDArray[np.uint32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Sequence[NDArray[np.uint32]]) -> Self:
        ends = np.cumsum([len(found) for found in sets], dtype=np.int64)
        return cls(np.concatenate(sets) if sets else np.empty(0, np.uint32), ends)

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self.ngrams[self.ends[index - 1] if index else 0 : self.ends[index]]


def hash_ngrams(text: str, ngram: int) -> NDArray[np.uint32]:
    """The n-grams of a text as sorted, distinct hashes. A shorter text is one n-gram."""
    words = normalized_words(text)
    grams = [" ".join(words[start : start + ngram]) for start in range(max(len(words) - ngram + 1, 1))]
    return np.unique(np.array([xxhash.xxh32_intdigest(gram.encode()) for gram in grams], np.uint32))


def sketch(sets: NgramSets, bands: Bands) -> NDArray[np.uint64]:
    """[bands, documents]: a hash of the minimum hashes of each band."""
    multipliers, offsets = _hash_functions(bands)
    minima = np.empty((len(sets.ends), bands.count * bands.rows), np.uint32)
    for index in range(len(sets.ends)):
        # Multiply-shift (Dietzfelbinger et al. 1997): the upper half of a product modulo 2^64.
        products = sets[index].astype(np.uint64)[:, None] * multipliers + offsets
        minima[index] = (products >> np.uint64(32)).min(axis=0)
    rows = np.ascontiguousarray(minima.reshape(len(sets.ends), bands.count, bands.rows).transpose(1, 0, 2))
    digests = [xxhash.xxh3_64_intdigest(row.tobytes()) for band in rows for row in band]
    return np.array(digests, np.uint64).reshape(bands.count, len(sets.ends))


@lru_cache
def _hash_functions(bands: Bands) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    generator = np.random.Generator(np.random.PCG64(_SEED))
    multipliers, offsets = generator.integers(0, 2**64, (2, bands.count * bands.rows), np.uint64, endpoint=False)
    return multipliers | np.uint64(1), offsets


def choose_duplicates(
    bands: Sequence[NDArray[np.uint64]], sets: Sequence[NgramSets], threshold: float
) -> NDArray[np.int64]:
    """The index of the kept document that each document duplicates, or -1.

    bands, sets: as `sketch` and `NgramSets` have them, of consecutive parts of the collection.
    """
    similarity = _Similarity(sets, threshold)
    for band in range(bands[0].shape[0] if bands else 0):
        _compare_band(np.concatenate([part[band] for part in bands]), similarity)
    kept = np.full(similarity.count, -1, np.int64)
    for later, earlier in similarity.similar_pairs():
        if kept[later] >= 0:
            continue
        if kept[earlier] < 0:
            kept[later] = earlier
        elif similarity.is_similar(later, int(kept[earlier])):
            kept[later] = kept[earlier]
    return kept


def _compare_band(keys: NDArray[np.uint64], similarity: "_Similarity") -> None:
    """Compare the documents of each bucket with its first one, those that are not similar to it with the first of
    them, and so on."""
    members = np.argsort(keys, kind="stable")
    keys = keys[members]
    for _ in range(_MEMBERS):
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
        others = np.flatnonzero(~is_first)
        if not len(others):
            return
        differ = ~similarity.compare(members[others], members[first[others]])
        members, keys = members[others[differ]], keys[others[differ]]


class _Similarity:
    """Whether pairs of documents are similar. `compare` remembers the pairs."""

    def __init__(self, sets: Sequence[NgramSets], threshold: float) -> None:
        self._sets = sets
        self._threshold = threshold
        self._starts = np.cumsum([0, *(len(part.ends) for part in sets)])
        self.count = int(self._starts[-1])
        self._known = np.empty(0, np.int64)  # sorted; a pair is later * count + earlier
        self._similar = np.empty(0, bool)

    def compare(self, later: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.bool_]:
        pairs = later.astype(np.int64) * self.count + earlier
        new = np.setdiff1d(pairs, self._known)
        if len(new):
            found = np.array([self.is_similar(pair // self.count, pair % self.count) for pair in new.tolist()], bool)
            places = np.searchsorted(self._known, new)
            self._known, self._similar = np.insert(self._known, places, new), np.insert(self._similar, places, found)
        return self._similar[np.searchsorted(self._known, pairs)]

    def similar_pairs(self) -> Iterator[tuple[int, int]]:
        """(later, earlier), in the order of the later ones."""
        for pair in self._known[self._similar].tolist():
            yield pair // self.count, pair % self.count

    def is_similar(self, left: int, right: int) -> bool:
        first, second = self._set(left), self._set(right)
        if min(len(first), len(second)) < self._threshold * max(len(first), len(second)):
            return False
        shared = len(np.intersect1d(first, second, assume_unique=True))
        return shared >= self._threshold * (len(first) + len(second) - shared)

    def _set(self, document: int) -> NDArray[Any]:
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self._sets[part][document - int(self._starts[part])]
