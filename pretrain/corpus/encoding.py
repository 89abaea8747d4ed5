"""Text -> token ids, in a worker process.

This module imports `tokenizers` and NumPy only, so that a worker is up in a fraction of a second and stays small. A
segmenter is opened with the first text that it is needed for.
"""

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from pretrain.corpus.words import (
    BoolArray,
    Segmenter,
    WordBoundaries,
    load_segmenter,
    segmented_word_starts,
    word_boundaries,
)

TokenIds = npt.NDArray[np.unsignedinteger]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """What a worker has to know of the tokenizer. Plain data: it crosses to the workers."""

    tokenizer_json: str
    unknown_id: int | None
    special_ids: tuple[int, ...]  # without the unknown token
    token_type: str  # uint16 | uint32
    segmenter: str | None = None  # that says where words begin


@dataclass(frozen=True)
class Encoded:
    """D documents back to back. `special` is the first document whose text gave a special token, which none may."""

    ids: TokenIds  # [tokens of all documents]
    lengths: Counts  # [D], in tokens
    unknown: Counts  # [D], unknown tokens
    words: Counts  # [D], separated by whitespace
    special: int | None
    word_starts: BoolArray | None  # [tokens of all documents] which ones begin a word; None: no segmenter was asked for


class Encoder:
    """`tokenizers` set up for the text of a corpus: no special tokens added or recognised, nothing cut or padded."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a literal [MASK] in the text is ordinary text
        self._tokenizer.post_processor = None  # it may move offsets
        self._vocabulary = vocabulary
        self._is_special = np.zeros(max((*vocabulary.special_ids, -1)) + 1, dtype=bool)
        self._is_special[list(vocabulary.special_ids)] = True

    def encode(self, texts: list[str]) -> Encoded:
        """Token ids of D texts. Whatever `tokenizers` raises passes through."""
        segmented = self._vocabulary.segmenter is not None
        encode = self._tokenizer.encode_batch if segmented else self._tokenizer.encode_batch_fast  # without offsets
        encodings = encode(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.array([len(document) for document in ids], dtype=np.int64)
        flat = np.array([token for document in ids for token in document], dtype=self._vocabulary.token_type)
        ends = np.cumsum(lengths)
        special = self._is_special[flat[flat < len(self._is_special)]].any()
        return Encoded(
            ids=flat,
            lengths=lengths,
            unknown=_count(flat == self._vocabulary.unknown_id, ends)
            if self._vocabulary.unknown_id is not None
            else np.zeros_like(lengths),
            words=np.array([len(text.split()) for text in texts], dtype=np.int64),
            special=self._first_special(flat, ends) if special else None,
            word_starts=self._word_starts(texts, encodings) if segmented else None,
        )

    def _word_starts(self, texts: list[str], encodings: list[Encoding]) -> BoolArray:
        marks, cut = self._segmenter
        return np.concatenate(
            [
                segmented_word_starts(
                    text, np.array(encoding.ids), np.array([first for first, _ in encoding.offsets]), marks, cut
                )
                for text, encoding in zip(texts, encodings, strict=True)
                if encoding.ids
            ]
            or [np.zeros(0, dtype=np.bool_)]
        )

    @cached_property
    def _segmenter(self) -> tuple[WordBoundaries, Segmenter]:
        """Opened for the first text that needs it."""
        assert self._vocabulary.segmenter is not None
        marks = word_boundaries(self._vocabulary.tokenizer_json)
        assert marks is not None, "refused before the build"
        return marks, load_segmenter(self._vocabulary.segmenter)

    def _first_special(self, flat: TokenIds, ends: Counts) -> int:
        first = np.flatnonzero(np.isin(flat, self._vocabulary.special_ids))[0]
        return int(np.searchsorted(ends, first, side="right"))


def _count(hits: npt.NDArray[np.bool_], ends: Counts) -> Counts:
    """How many hits each document has; `ends` are the documents' ends in `hits`."""
    total = np.concatenate([[0], np.cumsum(hits)])
    return np.diff(total[ends], prepend=0).astype(np.int64)


_encoder: Encoder | None = None


def start_worker(vocabulary: Vocabulary) -> None:
    """Called once in each worker process."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(vocabulary)


def encode_in_worker(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(texts)
