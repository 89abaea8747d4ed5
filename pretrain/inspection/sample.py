"""The sample of a corpus for an inspection, drawn by a seed: bounded, however large the corpus is."""

from dataclasses import dataclass

import numpy as np

from pretrain.corpus.reader import Corpus
from pretrain.corpus.shards import map_shard
from pretrain.corpus.tokenization import TokenIds

MAX_TOKENS = 2**30  # read about as many; more takes minutes
MAX_DOCUMENTS = 2000


@dataclass(frozen=True)
class SampledDocument:
    """One document of a corpus."""

    shard: int  # index in the manifest
    row: int  # in the shard
    number: int  # in the corpus, counted from 0
    ids: TokenIds  # [T] memory-mapped


@dataclass(frozen=True)
class Sample:
    """The shards and the documents that are read."""

    corpus: Corpus
    seed: int
    shards: tuple[int, ...]  # indices in the manifest, ascending
    documents: tuple[SampledDocument, ...]  # in the order of the corpus

    @property
    def share(self) -> float:
        """The share of the corpus's tokens that is in the shards."""
        return sum(self.corpus.manifest.shards[index].tokens for index in self.shards) / self.corpus.tokens


def draw_sample(corpus: Corpus, seed: int) -> Sample:
    """Draw all shards if the corpus has up to `MAX_TOKENS`, otherwise as many as hold this many; and up to
    `MAX_DOCUMENTS` documents, from all shards."""
    random = np.random.default_rng(seed)
    shards = corpus.manifest.shards
    order = random.permutation(len(shards))
    tokens = np.array([shard.tokens for shard in shards])[order]
    read = np.sort(order[np.cumsum(tokens) - tokens < MAX_TOKENS])
    numbers = np.sort(random.choice(corpus.documents, min(corpus.documents, MAX_DOCUMENTS), replace=False))
    return Sample(corpus, seed, tuple(read.tolist()), read_documents(corpus, numbers.tolist()))


def read_documents(corpus: Corpus, numbers: list[int]) -> tuple[SampledDocument, ...]:
    """Return the documents with these ascending numbers, counted from 0."""
    ends = np.cumsum([shard.rows for shard in corpus.manifest.shards])
    found: list[SampledDocument] = []
    for number in numbers:
        shard = int(np.searchsorted(ends, number, side="right"))
        if not found or found[-1].shard != shard:
            mapped = map_shard(corpus.path / corpus.manifest.shards[shard].file)
        row = number - int(ends[shard]) + corpus.manifest.shards[shard].rows
        found.append(SampledDocument(shard, row, number, mapped.ids[mapped.offsets[row] : mapped.offsets[row + 1]]))
    return tuple(found)
