"""A corpus in memory whose token ids are the positions of the tokens."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import SequenceIndex, split_documents
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig
from pretrain.corpus.word_boundaries import WordBoundaries

PAD, CLS, SEP, UNK, MASK = range(5)


@dataclass(frozen=True)
class MemoryCorpus:
    """A replacement for pretrain.corpus.reader.Corpus without files."""

    documents_tokens: tuple[NDArray[np.int32], ...]
    fingerprint: str = "0123456789abcdef0123"
    name: str = "memory"
    path: Path = field(default=Path("/nowhere"))

    @property
    def stream(self) -> NDArray[np.int32]:
        return np.concatenate(self.documents_tokens)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents_tokens))

    def read_word_starts(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        return None

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        stream = self.stream
        pieces = [stream[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


@pytest.fixture
def vocabulary() -> Vocabulary:
    """Ids 0-4 are special; of the others, multiples of 3 continue a word."""
    unmaskable = np.zeros(5000, dtype=bool)
    unmaskable[:5] = True
    marks = WordBoundaries(
        begins_word=np.arange(5000) % 3 != 0, ends_word=np.zeros(5000, bool), is_space=np.zeros(5000, bool)
    )
    return Vocabulary((CLS,), (SEP,), PAD, MASK, unmaskable, np.arange(5, 5000), marks)


@pytest.fixture
def corpus() -> MemoryCorpus:
    """300 documents of very different lengths; each token of the corpus has its own id."""
    rng = np.random.default_rng(3)
    lengths = rng.choice([1, 2, 3, 5, 8, 13, 40], size=300, p=[0.1, 0.1, 0.2, 0.2, 0.2, 0.15, 0.05])
    ids = np.arange(5, 5 + lengths.sum(), dtype=np.int32)
    return MemoryCorpus(tuple(np.split(ids, np.cumsum(lengths)[:-1])))


@pytest.fixture
def index(corpus: MemoryCorpus) -> SequenceIndex:
    """The corpus split into sequences of at most 14 text tokens."""
    lengths = split_documents(np.array([len(document) for document in corpus.documents_tokens]), 14)
    return SequenceIndex(np.concatenate([[0], np.cumsum(lengths)]))


@pytest.fixture
def maker(corpus: MemoryCorpus, index: SequenceIndex, vocabulary: Vocabulary) -> BatchMaker:
    """Global batches of 37 sequences of at most 16 slots, on one rank."""
    masker = Masker(vocabulary, MaskingConfig(), seed=5, corpus=corpus.fingerprint)
    order = ShuffledOrder((CorpusStream(len(index), seed=5),), BatchSizes(37))
    return BatchMaker(
        (MaskedCorpus(corpus, index, masker),),
        order,
        vocabulary,
        MicrobatchLayout(max_seq_length=16, microbatch_tokens=64),
    )
