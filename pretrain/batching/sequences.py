"""Split the documents of a corpus into sequences without losing a token.

A document that exceeds the maximum sequence length is split into chunks whose lengths differ by at most one token, so
there are no one-token tails; a shorter document is a sequence of its own. Sequences therefore cover the corpus's token
stream without gaps or overlaps, and an array of their start positions describes them completely.
"""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiment.errors import first_line
from experiment.file_locks import opened_lock
from experiment.files import atomic_write, exists_uncached, remove_unfinished
from pretrain.corpus.reader import Corpus

log = logging.getLogger(__name__)

_BLOCK = 1 << 22  # sequences that are checked at once


@dataclass(frozen=True)
class SequenceIndex:
    """The places of sequences in the corpus's token stream: sequence i is tokens [starts[i], starts[i + 1])."""

    starts: NDArray[np.int64]  # [N + 1], memory-mapped

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each sequence in `ids` [S], special tokens not counted."""
        return np.asarray(self.starts[ids + 1]) - np.asarray(self.starts[ids])


def split_documents(document_lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the lengths of the sequences into which documents of these lengths are split, in order.

    Each is at most `capacity`; sequences of one document differ by at most one token and add up to its length.
    """
    counts = -(-document_lengths // capacity)
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    base, longer = np.divmod(document_lengths, counts)
    return np.repeat(base, counts) + (within < np.repeat(longer, counts))


def open_index(corpus: Corpus, capacity: int, fallback: Path) -> SequenceIndex:
    """Return the index of `corpus` split into sequences of at most `capacity` text tokens; built and saved on first
    use.

    Saved in the corpus folder, or in `fallback` if that is read-only or its disk full; a damaged one is built again.
    Safe to call from several processes.
    """
    name = f"sequences-{capacity}-{corpus.fingerprint[:16]}.npy"
    folder = corpus.path / "index"
    index, _ = _read(folder / name, capacity, corpus.tokens)
    if index is not None:
        return index
    if os.access(folder if folder.exists() else corpus.path, os.W_OK):
        try:
            return _read_or_build(corpus, capacity, folder / name)
        except OSError as error:
            log.warning("cannot save the sequence index in %s, saving it in %s: %s", folder, fallback, error.strerror)
    return _read_or_build(corpus, capacity, fallback / name)


def _read_or_build(corpus: Corpus, capacity: int, path: Path) -> SequenceIndex:
    path.parent.mkdir(parents=True, exist_ok=True)
    index, problem = _read(path, capacity, corpus.tokens)
    if index is None:
        with opened_lock(path.with_name(f".{path.name}.lock")) as lock:
            lock(math.inf)  # without locks, each process builds the same
            if problem:  # else it is not read here: that takes long, and the other processes wait
                index, problem = _read(path, capacity, corpus.tokens)
                if problem:
                    log.warning("%s is damaged (%s) and is built again", path, problem)
            if problem or not exists_uncached(path):
                remove_unfinished(path.parent, path.name)
                _build(corpus, capacity, path)
        index, problem = _read(path, capacity, corpus.tokens)
    if index is None:
        raise RuntimeError(f"{path} cannot be read right after it was written: {problem}")
    return index


def _read(path: Path, capacity: int, tokens: int) -> tuple[SequenceIndex | None, str]:
    """Read (index, "") if the file holds a valid one, (None, the problem) if not, (None, "") if there is no file."""
    try:
        starts = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        return None, ""
    except Exception as error:  # numpy raises many types for a damaged header
        return None, first_line(error)
    problem = _find_damage(starts, capacity, tokens)
    return (None, problem) if problem else (SequenceIndex(starts), "")


def _find_damage(starts: NDArray[np.int64], capacity: int, tokens: int) -> str:
    """Return a contradiction to the invariants of an index, "" without one. Reads the whole file, block by block."""
    if starts.dtype != np.int64 or starts.ndim != 1 or len(starts) == 0:
        return f"an array of type {starts.dtype} and shape {starts.shape}"
    if starts[0] != 0 or starts[-1] != tokens:
        return f"covers the tokens {starts[0]} to {starts[-1]}, expected 0 to {tokens}"
    for first in range(0, len(starts) - 1, _BLOCK):
        lengths = np.diff(starts[first : first + _BLOCK + 1])
        if lengths.min() < 1 or lengths.max() > capacity:
            return f"has sequences of {lengths.min()} to {lengths.max()} tokens, expected 1 to {capacity}"
    return ""


def _build(corpus: Corpus, capacity: int, path: Path) -> None:
    """Write the index file. Not through a memory map: on a full disk, that would kill the process with SIGBUS."""
    count = sum(int((-(-lengths // capacity)).sum()) for lengths in corpus.document_lengths())
    header = {"descr": "<i8", "fortran_order": False, "shape": (count + 1,)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.int64(0).tobytes())
        end = 0
        for document_lengths in corpus.document_lengths():
            starts = end + np.cumsum(split_documents(document_lengths.astype(np.int64), capacity))
            file.write(starts.astype("<i8").data)
            end = int(starts[-1])
    log.info(
        f"{corpus.name}: {corpus.tokens:,} tokens split into {count:,} sequences of at most {capacity:,} text tokens"
    )
