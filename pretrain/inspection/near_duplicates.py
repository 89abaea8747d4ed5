"""Near-duplicates in a corpus: sampled documents are looked for in all shards.

A document is the set of its n-grams of tokens. All documents are sketched by MinHash, as `deepcloze clean` does, with
few hash functions: false candidates are few, because only sampled documents are looked for. Documents that agree with a
sampled one in a band are compared with it, until a near-duplicate is found.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiment.intervals import wilson_interval
from pretrain.batching.masking import Ranges
from pretrain.cleaning.minhash import NgramSets, choose_bands, jaccard, sketch, sorted_distinct
from pretrain.corpus.shards import MappedShard, map_shard
from pretrain.corpus.tokenization import TokenIds
from pretrain.inspection.sample import Sample, SampledDocument

NGRAM = 5
THRESHOLD = 0.8  # documents that are at least this similar are near-duplicates
_BANDS = choose_bands(THRESHOLD, hashes=32, recall=0.999)
_MAX_COMPARISONS = 1000  # of a document
_BLOCK = 2**16  # tokens that are hashed at once: they fit in the cache
_FACTORS = np.random.default_rng(5).integers(0, 2**64, NGRAM, dtype=np.uint64) | np.uint64(1)


class Pair(NamedTuple):
    """A sampled document and its first near-duplicate."""

    document: SampledDocument
    duplicate: SampledDocument
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    documents: int  # sampled
    pairs: tuple[Pair, ...]  # one for each that has one
    is_complete: bool  # all documents of the corpus were sampled

    @property
    def share(self) -> float:
        return len(self.pairs) / self.documents

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share in the corpus."""
        return (self.share, self.share) if self.is_complete else wilson_interval(self.share, self.documents)


def find_near_duplicates(sample: Sample, advance: Callable[[float], None]) -> NearDuplicates:
    """Look for each document of the sample in the shards of the sample. `advance` is called with tokens searched."""
    ngrams = lru_cache(64)(lambda number: ngram_set(sample.documents[number].ids))
    wanted, found, compared = _Wanted(sample), dict[int, Pair](), Counter[int]()
    ends = np.cumsum([shard.rows for shard in sample.corpus.manifest.shards])
    for index in sample.shards:
        shard = map_shard(sample.corpus.path / sample.corpus.manifest.shards[index].file)
        for rows in _blocks(shard):
            for row, number in wanted.candidates(shard, rows):
                document = sample.documents[number]
                if (document.shard, document.row) == (index, row):
                    continue
                ids = shard.ids[shard.offsets[row] : shard.offsets[row + 1]]
                if (similarity := jaccard(ngrams(number), ngram_set(ids))) >= THRESHOLD:
                    in_corpus = int(ends[index]) - (len(shard.offsets) - 1) + row
                    found[number] = Pair(document, SampledDocument(index, row, in_corpus, ids), similarity)
                compared[number] += 1
                if number in found or compared[number] == _MAX_COMPARISONS:
                    wanted.remove(number)
            advance(int(shard.offsets[rows.stop] - shard.offsets[rows.start]))
    pairs = tuple(found[number] for number in sorted(found))
    return NearDuplicates(len(sample.documents), pairs, len(sample.documents) == sample.corpus.documents)


def ngram_set(ids: TokenIds) -> NDArray[np.uint32]:
    """Return the hashes of the different n-grams of a document. A shorter document is one n-gram."""
    return sorted_distinct(_hash_ngrams(ids, np.array([0, len(ids)])).ngrams)


def _hash_ngrams(ids: TokenIds, offsets: NDArray[np.int64]) -> NgramSets:
    """Return the n-grams of documents, with repetitions: multilinear hashes (Carter and Wegman 1979), the upper half
    modulo 2^64. `ids` [T]; `offsets` [D + 1]: where each document begins, and where the last one ends."""
    tokens = np.pad(ids.astype(np.uint64) + np.uint64(1), (0, NGRAM))  # zeros stand for none
    hashes = np.zeros(len(ids), np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += tokens[place : place + len(ids)] * factor
    lengths = np.diff(offsets)
    short = np.flatnonzero(lengths < NGRAM)
    within = np.arange(NGRAM) < lengths[short, None]
    words = tokens[offsets[short, None] + np.arange(NGRAM)]
    hashes[offsets[short]] = (words * within * _FACTORS).sum(axis=1, dtype=np.uint64)
    counts = np.maximum(lengths - NGRAM + 1, 1)
    ngrams = hashes[Ranges(offsets[:-1], counts).indices()]
    return NgramSets((ngrams >> np.uint64(32)).astype(np.uint32), np.cumsum(counts))


def _blocks(shard: MappedShard) -> Iterator[range]:
    """Yield rows that have about `_BLOCK` tokens together."""
    edges = np.searchsorted(shard.offsets, np.arange(0, len(shard.ids), _BLOCK))
    for first, end in pairwise(np.unique([*edges.tolist(), len(shard.offsets) - 1]).tolist()):
        yield range(first, end)


class _Wanted:
    """The bands of sampled documents."""

    def __init__(self, sample: Sample) -> None:
        self._documents = defaultdict[int, set[int]](set)  # by the hash of a band
        self._bands = [
            sketch(_hash_ngrams(document.ids, np.array([0, len(document.ids)])), _BANDS).ravel().tolist()
            for document in sample.documents
        ]
        for number, keys in enumerate(self._bands):
            for key in keys:
                self._documents[key].add(number)
        self._keys = np.array(sorted(self._documents), np.uint64)

    def candidates(self, shard: MappedShard, rows: range) -> Iterator[tuple[int, int]]:
        """Yield (row, document) for all documents with which a row shares a band, in order."""
        offsets = shard.offsets[rows.start : rows.stop + 1].astype(np.int64)
        ngrams = _hash_ngrams(shard.ids[offsets[0] : offsets[-1]], offsets - offsets[0])
        keys = sketch(ngrams, _BANDS).T  # [rows, bands]
        nearest = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        matches = np.argwhere(self._keys[nearest] == keys).tolist()
        for row, bands in groupby(matches, key=itemgetter(0)):
            numbers = set[int]().union(*(self._documents[int(keys[row, band])] for _, band in bands))
            for number in sorted(numbers):
                yield rows.start + row, number

    def remove(self, number: int) -> None:
        """Leave a document out of the candidates of the rows that follow."""
        for key in self._bands[number]:
            self._documents[key].discard(number)
