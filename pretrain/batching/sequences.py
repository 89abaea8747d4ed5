"""Split the documents of a corpus into sequences without losing a token.

A document that exceeds the maximum sequence length is split into chunks whose lengths differ by at most one token, so
there are no one-token tails; a shorter document is a sequence of its own. Sequences therefore cover the corpus's token
stream without gaps or overlaps, and an array of their start positions describes them completely.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from experiment.files import atomic_write
from pretrain.corpus.reader import Corpus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceIndex:
    """Where each sequence is in the corpus's token stream: sequence i is tokens [starts[i], starts[i + 1])."""

    starts: NDArray[np.int64]  # [N + 1], memory-mapped

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of tokens of each sequence in `ids` [S], special tokens not counted."""
        return np.asarray(self.starts[ids + 1]) - np.asarray(self.starts[ids])


def split_documents(document_lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Lengths of the sequences into which documents of these lengths are split, in order.

    Each is at most `capacity`; those of one document differ by at most one token and add up to its length.
    """
    counts = -(-document_lengths // capacity)
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    base, longer = np.divmod(document_lengths, np.maximum(counts, 1))
    return np.repeat(base, counts) + (within < np.repeat(longer, counts))


def open_index(corpus: Corpus, capacity: int, fallback: Path) -> SequenceIndex:
    """The index of `corpus` split into sequences of at most `capacity` text tokens; built and saved on first use.

    Saved in the corpus folder, or in `fallback` if that is read-only. Safe to call from several processes.
    """
    name = f"sequences-{capacity}-{corpus.fingerprint[:16]}.npy"
    folder = corpus.path / "index"
    if not (folder / name).exists():
        if not os.access(folder if folder.exists() else corpus.path, os.W_OK):
            folder = fallback
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if not (folder / name).exists():
                _build(corpus, capacity, folder / name)
    return SequenceIndex(np.load(folder / name, mmap_mode="r"))


def _build(corpus: Corpus, capacity: int, path: Path) -> None:
    count = sum(int((-(-lengths // capacity)).sum()) for lengths in corpus.document_lengths())
    with atomic_write(path) as temporary:
        starts = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(count + 1,))
        starts[0], filled = 0, 0
        for document_lengths in corpus.document_lengths():
            lengths = split_documents(document_lengths.astype(np.int64), capacity)
            starts[filled + 1 : filled + 1 + len(lengths)] = starts[filled] + np.cumsum(lengths)
            filled += len(lengths)
        if filled != count or starts[-1] != corpus.tokens:
            raise RuntimeError(
                f"{corpus.path}: {int(starts[-1])} tokens were split into sequences, but the corpus has {corpus.tokens}"
            )
        starts.flush()
    log.info(
        "%s: %d tokens split into %d sequences of at most %d text tokens", corpus.name, corpus.tokens, count, capacity
    )
