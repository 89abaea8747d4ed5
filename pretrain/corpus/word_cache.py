"""Tokenize each word once, for tokenizers that encode words independently, as BERT's do.

A text has few different words. Looking them up takes half of the time of `tokenizers`, which computes each again. The
ids are the same.
"""

import itertools
import json
import re

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

TokenIds = npt.NDArray[np.unsignedinteger]
Counts = npt.NDArray[np.int64]

_MAX_WORDS = 2**18  # that are remembered when a batch begins: about 60 MB
_MAX_MEAN_LENGTH = 16  # characters of a word, in texts that have words
# How BertPreTokenizer splits a word of printable ASCII characters.
_ASCII_PIECE = re.compile(r"[a-zA-Z0-9]+|[^a-zA-Z0-9]")


def encodes_words_independently(tokenizer_json: str) -> bool:
    """Return whether the ids of a text are its words' ids, one after another: for WordPiece with BERT's normalizer and
    pre-tokenizer, which treat all whitespace alike and do not look past it."""
    state = json.loads(tokenizer_json)
    normalizer = state["normalizer"] or {}
    return (
        state["model"]["type"] == "WordPiece"
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]  # replaces tabs and newlines by spaces
        and (state["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and not any(token["content"].split() != [token["content"]] for token in state["added_tokens"])
    )


class WordCache:
    """Encodes texts with a tokenizer that `encodes_words_independently`, and remembers their words."""

    def __init__(self, tokenizer: Tokenizer, token_type: str) -> None:
        """`tokenizer`: adds no special tokens to `encode_batch_fast(…, add_special_tokens=False)`, and recognizes none.
        `token_type`: of the ids, uint16 or uint32."""
        self._tokenizer = tokenizer
        # A token that is added may be recognized in a part of a word.
        self._splits_ascii = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
        self._token_type = token_type
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}  # of words
        self._piece_ids: dict[str, list[int]] = {}
        self._ids: TokenIds = np.zeros(0, self._token_type)  # of all words
        self._starts: Counts = np.zeros(0, np.int64)  # [words] where the ids of a word start
        self._lengths: Counts = np.zeros(0, np.int64)  # [words] tokens

    def encode(self, texts: list[str]) -> tuple[TokenIds, Counts] | None:
        """Return the ids of D texts, concatenated, and the number of tokens of each, [D].

        None for texts without spaces between words, such as Chinese.
        """
        words = [_split(text) for text in texts]
        counts = np.fromiter(map(len, words), np.int64, len(words))
        if sum(map(len, texts)) > _MAX_MEAN_LENGTH * counts.sum():
            return None
        if len(self._numbers) > _MAX_WORDS:
            self._forget()
        self._add(list(set().union(*words).difference(self._numbers)))
        numbers = np.fromiter(
            map(self._numbers.__getitem__, itertools.chain.from_iterable(words)), np.int64, counts.sum()
        )
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        ends_of_texts = np.concatenate([[0], ends])[np.cumsum(counts)]
        offsets = np.repeat(self._starts[numbers] - (ends - lengths), lengths)
        return self._ids[np.arange(len(offsets)) + offsets], np.diff(ends_of_texts, prepend=0)

    def _add(self, words: list[str]) -> None:
        pieces = [self._pieces(word) for word in words]
        missing = list(set().union(*pieces).difference(self._piece_ids))
        encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        self._piece_ids.update(zip(missing, (encoding.ids for encoding in encodings), strict=True))
        ids = [list(itertools.chain.from_iterable(map(self._piece_ids.__getitem__, parts))) for parts in pieces]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        self._numbers.update(zip(words, itertools.count(len(self._numbers)), strict=False))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        flat = np.fromiter(itertools.chain.from_iterable(ids), self._token_type, int(lengths.sum()))
        self._ids = np.concatenate([self._ids, flat])

    def _pieces(self, word: str) -> list[str]:
        if self._splits_ascii and word.isascii() and word.isprintable():
            return _ASCII_PIECE.findall(word)
        return [word]


def _split(text: str) -> list[str]:
    """Split at spaces, tabs and newlines, which are whitespace to all tokenizers. Words may be empty."""
    words = text.split()  # at other whitespace too
    if " ".join(words) == text:
        return words
    return text.replace("\n", " ").replace("\t", " ").replace("\r", " ").split(" ")
