"""Turn text into token ids. Runs in the worker processes of a corpus build.

Imports only `tokenizers` and NumPy, so that workers start fast and stay small. The segmenter is loaded when it is first
needed.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from experiment.models.tokenizer import special_token_ids, vocabulary_size
from experiment.unspaced_scripts import HAN
from pretrain.corpus.segmenter import Segmenter, SegmenterSpec, load_segmenter
from pretrain.corpus.word_boundaries import BoolArray, WordBoundaries, segmented_word_starts, word_boundaries
from pretrain.corpus.word_cache import WordCache, encodes_words_independently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokenIds = NDArray[np.unsignedinteger]
Counts = NDArray[np.int64]

_SAMPLED_CHARACTERS, _LONGEST_UNKNOWN = 10_000, 40  # of a batch, to count unknown texts, and of such a text
_UNKNOWN_TEXTS = 10  # kept
# More than a word in a script without spaces. `re` with ranges takes half of the time of `regex` with UNSPACED.
_UNSPACED_WORDS = re.compile(rf"[{HAN}\u3041-\u30ff\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]{{7,}}")


@dataclass(frozen=True)
class TokenizerSpec:
    """Plain data of a tokenizer for a worker, which can be pickled."""

    tokenizer_json: str
    unknown_id: int | None
    special_ids: tuple[int, ...]  # without the unknown token
    token_type: str  # uint16 | uint32
    segmenter: SegmenterSpec | None = None  # finds word starts; None: they are not stored

    @cached_property
    def letters_give_tokens(self) -> bool:
        """Whether each letter and digit gives a token: it is known, or has bytes or a token for unknown text."""
        state = json.loads(self.tokenizer_json)
        model, splitting = state["model"], json.dumps(state["pre_tokenizer"])
        has_unknown = (model.get("unk_token"), model.get("unk_id")) != (None, None)
        return has_unknown or model.get("byte_fallback", False) or "ByteLevel" in splitting

    @cached_property
    def loses_capitals(self) -> bool:
        """Whether all capital letters of ASCII are unknown, and no small ones: the tokenizer does not lowercase text,
        but its vocabulary is uncased."""
        encode = Tokenizer.from_str(self.tokenizer_json).encode
        return ascii_uppercase == "".join(letter for letter in ascii_letters if self.unknown_id in encode(letter).ids)


def tokenizer_spec(tokenizer: "PreTrainedTokenizerFast", segmenter: SegmenterSpec | None = None) -> TokenizerSpec:
    """Extract the spec of a tokenizer."""
    unknown = tokenizer.unk_token_id
    return TokenizerSpec(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        unknown_id=unknown,
        special_ids=tuple(sorted(special_token_ids(tokenizer) - {unknown})),
        token_type="uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32",
        segmenter=segmenter,
    )


@dataclass(frozen=True)
class EncodedBatch:
    """D documents, concatenated."""

    ids: TokenIds  # [tokens of all documents]
    lengths: Counts  # [D] tokens
    unknown: Counts  # [D] unknown tokens
    words: Counts  # [D] words of the segmenter; without one, those separated by whitespace
    unspaced: Counts  # [D] characters of scripts without spaces, in text that is not divided into words
    special: int | None  # index of the first document with a special token, which a corpus must not have
    word_starts: BoolArray | None  # [tokens of all documents] tokens that begin a word; None: no segmenter


class DocumentEncoder:
    """A tokenizer set up for corpora: no truncation or padding, and special tokens are neither added nor recognized."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = Tokenizer.from_str(hide_special_tokens(spec.tokenizer_json, spec.special_ids))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a literal [MASK] in the text is ordinary text
        self._tokenizer.post_processor = None  # it may change offsets
        self._spec = spec
        has_words = spec.segmenter is None and encodes_words_independently(spec.tokenizer_json)
        self._words = WordCache(self._tokenizer) if has_words else None

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Encode D texts. Lets exceptions of `tokenizers` through."""
        flat, lengths, word_starts = self._tokenize(texts)
        ends = np.cumsum(lengths)
        words = np.array([len(text.split()) for text in texts], dtype=np.int64)
        unspaced = [0 if text.isascii() else sum(map(len, _UNSPACED_WORDS.findall(text))) for text in texts]
        special = np.flatnonzero(np.isin(flat, self._spec.special_ids))
        return EncodedBatch(
            ids=flat,
            lengths=lengths,
            unknown=_count_per_document(flat == self._spec.unknown_id, ends),  # no id equals None
            words=words if word_starts is None else _count_per_document(word_starts, ends),
            unspaced=np.array(unspaced, dtype=np.int64),
            special=int(np.searchsorted(ends, special[0], side="right")) if len(special) else None,
            word_starts=word_starts,
        )

    def unknown_texts(self, texts: list[str], encoded: EncodedBatch) -> Counter[str]:
        """Count what unknown tokens stand for at the beginning of the documents that have some, in a small part of a
        batch. encoded: of these texts."""
        found, left = Counter[str](), _SAMPLED_CHARACTERS
        for index in np.flatnonzero(encoded.unknown):
            text = texts[index][:left]
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            places = zip(encoding.ids, encoding.offsets, strict=True)
            unknown = (text[first:last].strip() for token, (first, last) in places if token == self._spec.unknown_id)
            found.update(piece[:_LONGEST_UNKNOWN] for piece in unknown if piece)
            left -= len(text)
            if left == 0:
                break
        return found

    def _tokenize(self, texts: list[str]) -> tuple[TokenIds, Counts, BoolArray | None]:
        """Return the ids, lengths and word starts of `EncodedBatch`."""
        ids = None if self._words is None else self._words.encode(texts)
        word_starts = None
        if ids is None:
            segmented = self._spec.segmenter is not None
            encode = self._tokenizer.encode_batch if segmented else self._tokenizer.encode_batch_fast  # without offsets
            encodings = encode(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            word_starts = self._word_starts(texts, encodings) if segmented else None
        lengths = np.array([len(document) for document in ids], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(ids), self._spec.token_type, int(lengths.sum()))
        return flat, lengths, word_starts

    def _word_starts(self, texts: list[str], encodings: list[Encoding]) -> BoolArray:
        boundaries, segmenter = self._segmentation
        found = [np.zeros(0, dtype=np.bool_)]
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.ids:
                ids, offsets = np.array(encoding.ids), np.array(encoding.offsets)
                found.append(segmented_word_starts(text, ids, offsets, boundaries, segmenter))
        return np.concatenate(found)

    @cached_property
    def _segmentation(self) -> tuple[WordBoundaries, Segmenter]:
        assert self._spec.segmenter is not None
        boundaries = word_boundaries(self._spec.tokenizer_json)
        assert boundaries is not None, "checked before the build starts"
        return boundaries, load_segmenter(self._spec.segmenter)


def most_frequent(unknown: Counter[str]) -> dict[str, int]:
    """Return the most frequent unknown texts, and the most frequent one with a capital letter of ASCII."""
    capitals = Counter({text: count for text, count in unknown.items() if not {*ascii_uppercase}.isdisjoint(text)})
    return dict(unknown.most_common(_UNKNOWN_TEXTS) + capitals.most_common(1))


def hide_special_tokens(tokenizer_json: str, special_ids: Container[int]) -> str:
    """Return the tokenizer with other names for its special tokens, which no text has; all ids stay.

    `encode_special_tokens` does not keep a model from finding a literal `<s>` in its vocabulary, as Unigram does.
    Tokens in the merges of BPE keep their names.
    """
    state = json.loads(tokenizer_json)
    model = state["model"]
    pieces = {piece for piece, _ in model["vocab"]} if isinstance(model["vocab"], list) else model["vocab"].keys()
    # `tokenizers` numbers added tokens that the vocabulary lacks in their order, so these keep their places.
    state["added_tokens"] = [
        {**token, "content": _hidden_name(token["id"]), "normalized": False} if token["id"] in special_ids else token
        for token in state["added_tokens"]
        if token["id"] not in special_ids or token["content"] not in pieces
    ]
    if isinstance(model["vocab"], list):  # of Unigram: pieces with scores, by id
        model["vocab"] = [
            [_hidden_name(number) if number in special_ids else piece, score]
            for number, (piece, score) in enumerate(model["vocab"])
        ]
    else:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        merged = {piece for merge in merges for piece in (*merge, "".join(merge))}
        model["vocab"] = {
            _hidden_name(number) if number in special_ids and token not in merged else token: number
            for token, number in model["vocab"].items()
        }
    return json.dumps(state)


def _hidden_name(number: int) -> str:
    return f"\x00 \ufffe{number}"


def _count_per_document(hits: BoolArray, ends: Counts) -> Counts:
    """Count the hits [tokens] of each document [D]; `ends` [D] are the documents' ends."""
    total = np.concatenate([[0], np.cumsum(hits)])
    return np.diff(total[ends], prepend=0).astype(np.int64)
