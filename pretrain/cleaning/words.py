"""Divide text into words, without a model or a network.

A word is a run of letters and digits, with apostrophes inside. In scripts that are written without spaces, each
character is a word, so that n-grams of Chinese are n-grams of characters.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import regex
from pydantic import AfterValidator

from experiment.unspaced_scripts import UNSPACED

_LETTER = r"[\p{L}\p{N}]--[\uff9e\uff9f]"
_INSIDE = r"\p{M}\u00ad\u200c\u200d\uff9e\uff9f"  # marks, soft hyphens, joiners, half-width voicing
_RUN = rf"[{_LETTER}--[{UNSPACED}]][[\p{{L}}\p{{N}}{_INSIDE}]--[{UNSPACED}]]*"
_WORD = regex.compile(rf"(?V1){_RUN}(?:['’]{_RUN})*|[{_LETTER}][{_INSIDE}]*")
_CHARACTER = regex.compile(rf"[{UNSPACED}]\p{{M}}*")
_TOKEN = regex.compile(rf"{_WORD.pattern}|[^\p{{L}}\p{{N}}\s]+")
# Contractions are divided as in the Penn Treebank: do|n't, it|'s.
_DIVIDED = regex.compile(rf"(?V1)(?i:n't)(?!{_RUN})|{_RUN}(?!(?<=[nN])'[tT](?!{_RUN}))|[{_LETTER}][{_INSIDE}]*")
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ＇`´\x92", "'"))  # as typed; \x92: of text that was read as Latin-1
_MAX_CACHED = 64  # characters of a word: hexadecimal dumps and the like have long ones, each once
_IGNORED = regex.compile(r"[\p{Cf}\ufe00-\ufe0f]")  # they only change how others look
CLOSING = r"\"'”’)\]）」』》】"
"""Quotes and brackets that belong to the sentence before them, for a set of characters in `regex`."""
# A lookbehind that begins at each quote would take quadratic time: (?=\s) and the like come first.
# Half-width marks in Chinese may have no space after them.
_SENTENCE_END = regex.compile(
    rf"(?=\s)(?<=[.!?…][{CLOSING}]*)\s+|(?![。！？!?…{CLOSING}])(?<=[。！？][!?…{CLOSING}]*)"
    rf"|(?=[{UNSPACED}])(?<=[!?][{CLOSING}]*)"
)


def tokens(text: str) -> list[str]:
    """Return words and runs of punctuation, in order."""
    found: list[str] = _TOKEN.findall(text)
    return found


def sentences(text: str) -> list[str]:
    """Sentences, by their punctuation."""
    return [part for part in _SENTENCE_END.split(text) if part.strip()]


def normalized_words(text: str) -> list[str]:
    """Return the words of a text without punctuation, case and diacritics, for comparing texts."""
    # In little memory: `findall` makes a string of each word, `_normalize` returns the same for the same words.
    return [_normalize(found.group()) for found in _WORD.finditer(text)]


def _check_words(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if len(words := normalized_words(text)) != 1:
            raise ValueError(f"'{text}' is not one word; texts are divided into words as here: {', '.join(words)}")
    return texts


Words = Annotated[tuple[str, ...], AfterValidator(_check_words)]
"""Words of a config, such as stop words: each has to be one by the rules here."""


def divided_words(text: str) -> list[str]:
    """Return normalized words with contractions divided: the same for `it's` and `it 's`, `don’t` and `do n't`."""
    return [_normalize(word) for word in _DIVIDED.findall(text.translate(_APOSTROPHES))]


def count_words(words: Sequence[str]) -> float:
    """Return the number of words of `normalized_words`. Two characters of a script without spaces count as one word."""
    return sum(0.5 if _CHARACTER.fullmatch(word) else 1.0 for word in words)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of the words of `divided_words`."""
    return [found.span() for found in _DIVIDED.finditer(text.translate(_APOSTROPHES))]


def _normalize(word: str) -> str:
    return _cached_plain(word) if len(word) <= _MAX_CACHED else _plain(word)


def _plain(word: str) -> str:
    parts = unicodedata.normalize("NFKD", word.casefold())
    plain = "".join(part for part in parts if not (unicodedata.combining(part) or _IGNORED.fullmatch(part)))
    return plain.replace("’", "'")


_cached_plain = lru_cache(maxsize=1 << 18)(_plain)
