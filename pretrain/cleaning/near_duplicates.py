"""The near-duplicates that are dropped, found by MinHash.

1. A document is the set of its n-grams of normalized words. Workers hash each set into bands.
2. Band by band, documents that agree are compared by the true similarity of their sets.
3. In the order of the collection, a document is dropped if it is similar to an earlier one that is kept.

So every dropped document has a kept one at or above the threshold: similarity is not passed on along chains, as it is
with connected components. One band is in memory at a time; the sets stay on disk.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from experiment.progress import track
from pretrain.cleaning.arrays import StoredArray, first_of_equal
from pretrain.cleaning.minhash import NgramSets, jaccard, sorted_distinct
from pretrain.cleaning.words import normalized_words

_MEMBERS = 32  # of a bucket, or beside a dropped document, that a document is compared with
_CACHED_SETS = 2 * _MEMBERS  # many documents may be compared with the same ones


def hash_ngrams(text: str, ngram: int) -> NDArray[np.uint32]:
    """Return the n-grams of a text as sorted, distinct hashes. A shorter text is one n-gram, and so is one
    without letters and digits."""
    words = normalized_words(text) or [text]
    starts = range(max(len(words) - ngram + 1, 1))
    hashes = (xxhash.xxh32_intdigest(" ".join(words[start : start + ngram]).encode()) for start in starts)
    return sorted_distinct(np.fromiter(hashes, np.uint32, len(starts)))


def choose_duplicates(
    bands: Sequence[NDArray[np.uint64] | StoredArray], sets: Sequence[NgramSets], threshold: float
) -> NDArray[np.int64]:
    """Return the index of the kept document that each document duplicates, or -1.

    bands, sets: as `sketch` and `NgramSets` have them, of consecutive parts of the collection.
    """
    similarity = _Similarity(sets, threshold)
    for band in track(range(len(bands[0])), "comparing documents", len(bands[0]), "bands"):
        _compare_band(np.concatenate([part[band : band + 1][0] for part in bands]), similarity)
    kept = np.full(similarity.count, -1, np.int64)
    others = dict[int, list[int]]()  # similar to a dropped document; no band need have compared them with each other
    for later, earlier in similarity.similar_pairs():
        if kept[later] >= 0:
            continue
        if kept[earlier] < 0:
            kept[later] = earlier
            continue
        beside = others.setdefault(earlier, [int(kept[earlier])])
        beside[:] = [other for other in beside if kept[other] < 0]
        kept[later] = next((other for other in beside if similarity.is_similar(later, other)), -1)
        if kept[later] < 0 and len(beside) < _MEMBERS:
            beside.append(later)
    return kept


def _compare_band(keys: NDArray[np.uint64], similarity: "_Similarity") -> None:
    """Compare the documents of each bucket with its first one, those that are not similar to it with the first of
    them, and so on."""
    members = np.argsort(keys, kind="stable")
    keys = keys[members]
    for _ in range(_MEMBERS):
        first = first_of_equal(keys)
        others = np.flatnonzero(first != np.arange(len(keys)))
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
        self._set = lru_cache(_CACHED_SETS)(self._read_set)

    def compare(self, later: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.bool_]:
        pairs = later.astype(np.int64) * self.count + earlier
        new = sorted_distinct(pairs)
        places = np.searchsorted(self._known, new)
        is_new = places == np.searchsorted(self._known, new, side="right")
        new, places = new[is_new], places[is_new]
        if len(new):
            found = np.array([self.is_similar(*divmod(pair, self.count)) for pair in new.tolist()], bool)
            self._known, self._similar = np.insert(self._known, places, new), np.insert(self._similar, places, found)
        return self._similar[np.searchsorted(self._known, pairs)]

    def similar_pairs(self) -> Iterator[tuple[int, int]]:
        """Return pairs of (later, earlier), in the order of the later ones."""
        return (divmod(pair, self.count) for pair in self._known[self._similar].tolist())

    def is_similar(self, left: int, right: int) -> bool:
        sizes = [part.size(index) for part, index in (self._find(left), self._find(right))]
        if min(sizes) / max(sizes) < self._threshold:
            return False
        return jaccard(self._set(left), self._set(right)) >= self._threshold

    def _read_set(self, document: int) -> NDArray[np.uint32]:
        part, index = self._find(document)
        return part[index]

    def _find(self, document: int) -> tuple[NgramSets, int]:
        number = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self._sets[number], document - int(self._starts[number])
