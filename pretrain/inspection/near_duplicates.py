"""How many documents occur in the corpus again, slightly changed: sampled documents are looked for in all shards.

The similarity of two documents is the Jaccard similarity of their sets of n-grams of tokens (Broder 1997, "On the
resemblance and containment of documents").

1. A sampled document is represented by its n-grams with the lowest hashes, a *sketch*; how many of them another
   document has estimates the similarity (Irber et al. 2022, "Lightweight compositional analysis of metagenomes with
   FracMinHash").
2. A few n-grams of each sketch, the keys, are looked up in all shards.
3. Documents that have half of the keys are compared with the sketch, until a near-duplicate is found.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64
from pretrain.batching.masking import Ranges
from pretrain.corpus.shards import MappedShard, map_shard
from pretrain.corpus.word_cache import TokenIds
from pretrain.inspection.sample import Document, Sample

NGRAM = 5
THRESHOLD = 0.8  # documents that are at least this similar are near-duplicates
_SKETCH, _KEYS = 1024, 32  # n-grams of a document
_MAX_COMPARISONS = 1000  # of a document
_BLOCK = 2**16  # tokens that are hashed at once: they fit in the cache
_FILTER_BITS = 24
_FACTORS = np.random.default_rng(5).integers(0, 2**64, NGRAM, dtype=np.uint64) | np.uint64(1)


class Pair(NamedTuple):
    """A sampled document and its first near-duplicate."""

    document: Document
    duplicate: Document
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """Which of the sampled documents have a near-duplicate."""

    documents: int  # sampled
    pairs: tuple[Pair, ...]  # one for each that has one
    is_complete: bool  # all documents of the corpus were sampled

    @property
    def share(self) -> float:
        return len(self.pairs) / self.documents

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share in the corpus (Wilson 1927). Without scipy, which takes a second to import."""
        if self.is_complete:
            return self.share, self.share
        z, n, p = NormalDist().inv_cdf(0.975), self.documents, self.share
        center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)


def find_near_duplicates(sample: Sample, advance: Callable[[float], None]) -> NearDuplicates:
    """Look for each document of the sample in the shards of the sample. `advance` is called with tokens searched."""
    sketches = [_sketch(document.ids) for document in sample.documents]
    keys, found, compared = _Keys.of(sketches), dict[int, Pair](), Counter[int]()
    ends = np.cumsum([shard.rows for shard in sample.corpus.manifest.shards])
    for index in sample.shards:
        shard = map_shard(sample.corpus.path / sample.corpus.manifest.shards[index].file)
        for rows in _blocks(shard):
            done = set[int]()
            for row, number in _candidates(shard, rows, keys):
                document = sample.documents[number]
                if number in done or (document.shard, document.row) == (index, row):
                    continue
                ids = shard.ids[shard.offsets[row] : shard.offsets[row + 1]]
                if (similarity := _similarity(sketches[number], ngram_hashes(ids))) >= THRESHOLD:
                    in_corpus = int(ends[index]) - (len(shard.offsets) - 1) + row
                    found[number] = Pair(document, Document(index, row, in_corpus, ids), similarity)
                compared[number] += 1
                if number in found or compared[number] == _MAX_COMPARISONS:
                    done.add(number)
            keys = keys.without(done) if done else keys
            advance(int(shard.offsets[rows.stop] - shard.offsets[rows.start]))
    pairs = tuple(found[number] for number in sorted(found))
    return NearDuplicates(len(sample.documents), pairs, len(sample.documents) == sample.corpus.documents)


def ngram_hashes(ids: TokenIds) -> U64:
    """The hashes of the different n-grams of a document, ascending. A shorter document is one n-gram."""
    return np.unique(_rolling_hashes(_tokens(ids, max(0, NGRAM - len(ids)))))


def _tokens(ids: TokenIds, padding: int) -> U64:
    """Ids plus one, and zeros, which stand for none."""
    return np.pad(ids.astype(np.uint64) + np.uint64(1), (0, padding))


def _rolling_hashes(tokens: U64) -> U64:
    """The hash of the n-gram at each place, [T - NGRAM + 1]: multilinear (Carter and Wegman 1979), modulo 2^64, with
    good high bits. `tokens` [T]."""
    count = len(tokens) - NGRAM + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += tokens[place : place + count] * factor
    return hashes


class _Sketch(NamedTuple):
    """The n-grams of a document whose hashes are at most `limit`."""

    hashes: U64  # ascending
    limit: np.uint64


def _sketch(ids: TokenIds) -> _Sketch:
    hashes = ngram_hashes(ids)
    kept = hashes[:_SKETCH].copy()
    return _Sketch(kept, kept[-1] if len(kept) < len(hashes) else np.uint64(2**64 - 1))


def _similarity(sketch: _Sketch, hashes: U64) -> float:
    """Of the document of the sketch and one that has these n-grams, ascending."""
    below = hashes[: np.searchsorted(hashes, sketch.limit, side="right")]
    shared = np.isin(sketch.hashes, below, assume_unique=True).sum()
    return float(shared / (len(sketch.hashes) + len(below) - shared))


def _high_bits(hashes: U64) -> NDArray[np.bool_]:
    """Which values the high bits of these hashes have."""
    bits = np.zeros(2**_FILTER_BITS, dtype=np.bool_)
    bits[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return bits


class _Keys(NamedTuple):
    """The n-grams that are looked up."""

    hashes: U64  # [K] ascending; a hash occurs once for each document that has it
    documents: NDArray[np.int64]  # [K]
    counts: NDArray[np.int64]  # [documents] keys of each
    bits: NDArray[np.bool_]  # as `_high_bits`

    @classmethod
    def of(cls, sketches: Sequence[_Sketch]) -> Self:
        hashes = [sketch.hashes[:_KEYS] for sketch in sketches]
        counts = np.array([len(each) for each in hashes])
        together, documents = np.concatenate(hashes), np.repeat(np.arange(len(sketches)), counts)
        order = np.argsort(together, kind="stable")
        return cls(together[order], documents[order], counts, _high_bits(together))

    def without(self, documents: Collection[int]) -> Self:
        kept = ~np.isin(self.documents, list(documents))
        hashes = self.hashes[kept]
        return self._replace(hashes=hashes, documents=self.documents[kept], bits=_high_bits(hashes))

    def find(self, hashes: U64) -> NDArray[np.int64]:
        """Where keys are among hashes [H]; fast if few are."""
        places = np.flatnonzero(self.bits[hashes >> np.uint64(64 - _FILTER_BITS)])
        if not len(places):
            return places
        nearest = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        found: NDArray[np.int64] = places[self.hashes[nearest] == hashes[places]]
        return found


def _blocks(shard: MappedShard) -> Iterator[range]:
    """Rows that have about `_BLOCK` tokens together."""
    edges = np.searchsorted(shard.offsets, np.arange(0, len(shard.ids), _BLOCK))
    for first, end in pairwise(np.unique([*edges.tolist(), len(shard.offsets) - 1]).tolist()):
        yield range(first, end)


def _candidates(shard: MappedShard, rows: range, keys: _Keys) -> Iterator[tuple[int, int]]:
    """Yield (row, document) for all documents of which a row has half of the keys."""
    offsets = shard.offsets[rows.start : rows.stop + 1].astype(np.int64)
    tokens, offsets = _tokens(shard.ids[offsets[0] : offsets[-1]], NGRAM - 1), offsets - offsets[0]
    hashes = _rolling_hashes(tokens)
    places = keys.find(hashes)  # also n-grams that cross the end of a row, rarely: the comparison finds that
    of_place = np.searchsorted(offsets, places, side="right") - 1
    # Documents that are shorter than an n-gram.
    short = np.flatnonzero(np.diff(offsets) < NGRAM)
    within = np.arange(NGRAM) < np.diff(offsets)[short, None]
    short_hashes = (tokens[offsets[short, None] + np.arange(NGRAM)] * within * _FACTORS).sum(axis=1, dtype=np.uint64)
    short_places = keys.find(short_hashes)

    rows_found = np.concatenate([of_place, short[short_places]])
    keys_found = np.searchsorted(keys.hashes, np.concatenate([hashes[places], short_hashes[short_places]]))
    row, key = np.divmod(np.unique(rows_found * len(keys.hashes) + keys_found), max(1, len(keys.hashes)))
    sharing = np.searchsorted(keys.hashes, keys.hashes[key], side="right") - key
    documents = keys.documents[Ranges(key, sharing).indices()]
    pairs, shared = np.unique(np.repeat(row, sharing) * len(keys.counts) + documents, return_counts=True)
    row, documents = np.divmod(pairs, len(keys.counts))
    enough = 2 * shared >= keys.counts[documents]
    yield from zip((rows.start + row[enough]).tolist(), documents[enough].tolist(), strict=True)
