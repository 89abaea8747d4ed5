"""Tokenize each word once, for tokenizers that encode words independently, as BERT's do.

A text has few different words. Looking them up takes half of the time of `tokenizers`, which computes each again. The
ids are the same.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer

_MAX_WORDS = 2**18  # that are remembered when a batch begins: about 60 MB
_MAX_CHARACTERS = 2**22  # of these words: text without spaces has long ones
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

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: adds no special tokens with `add_special_tokens=False`, and recognizes none."""
        self._tokenizer = tokenizer
        # A token that is added may be recognized in a part of a word.
        self._splits_ascii = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
        self._word_ids: dict[str, list[int]] = {}
        self._piece_ids: dict[str, list[int]] = {}
        self._characters = 0

    def encode(self, texts: list[str]) -> list[list[int]] | None:
        """Return the ids of each text. None for texts without spaces between words, such as Chinese."""
        words = [_split(text) for text in texts]
        if sum(map(len, texts)) > _MAX_MEAN_LENGTH * sum(map(len, words)):
            return None
        if len(self._word_ids) > _MAX_WORDS or self._characters > _MAX_CHARACTERS:
            self._word_ids, self._piece_ids, self._characters = {}, {}, 0
        self._add(set().union(*words).difference(self._word_ids))
        return [_joined(self._word_ids, text) for text in words]

    def _add(self, words: Iterable[str]) -> None:
        pieces = {word: self._pieces(word) for word in words}
        self._characters += sum(map(len, pieces))
        missing = list(set().union(*pieces.values()).difference(self._piece_ids))
        encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        self._piece_ids.update(zip(missing, (encoding.ids for encoding in encodings), strict=True))
        self._word_ids.update((word, _joined(self._piece_ids, parts)) for word, parts in pieces.items())

    def _pieces(self, word: str) -> list[str]:
        if self._splits_ascii and word.isascii() and word.isprintable():
            return _ASCII_PIECE.findall(word)
        return [word]


def _joined(ids: Mapping[str, list[int]], parts: Iterable[str]) -> list[int]:
    return list(itertools.chain.from_iterable(map(ids.__getitem__, parts)))


def _split(text: str) -> list[str]:
    """Split at spaces, tabs and newlines, which are whitespace to all tokenizers. Words may be empty."""
    words = text.split()  # at other whitespace too
    if " ".join(words) == text:
        return words
    return text.replace("\n", " ").replace("\t", " ").replace("\r", " ").split(" ")
