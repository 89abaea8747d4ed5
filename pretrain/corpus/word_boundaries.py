"""Find where words begin in a stream of tokens, from the tokenizer's own marks or, in Chinese, from a segmenter.

WordPiece marks the pieces that continue a word (`##ing`). Byte-level BPE and SentencePiece mark the pieces that follow
a space (`Ġword`, `▁word`). Chinese has no spaces, and BERT's WordPiece makes every Chinese character a word of its own.
A segmenter finds the real words, but it needs the raw text, which is available only while a corpus is built.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel

from pretrain.corpus.segmenter import Segmenter

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class WordBoundaries:
    """Word boundaries of a tokenizer's vocabulary, one flag per token id."""

    begins_word: BoolArray  # [largest id + 1] a word begins at this token
    ends_word: BoolArray  # [largest id + 1] a word ends with this token
    is_space: BoolArray  # [largest id + 1] a lone space, which belongs to the word after it

    def word_starts(self, ids: NDArray[np.integer[Any]]) -> BoolArray:
        """Mark the tokens [T] of one text that begin a word. The first token always does."""
        starts: BoolArray = self.begins_word[ids]
        starts[1:] |= self.ends_word[ids[:-1]]
        return self.attach_spaces(starts, ids)

    def attach_spaces(self, starts: BoolArray, ids: NDArray[np.integer[Any]]) -> BoolArray:
        """Change word starts [T] in place: none right after a lone space, one at the first token."""
        starts[1:] &= ~self.is_space[ids[:-1]]
        starts[:1] = True
        return starts


def word_boundaries(tokenizer_json: str) -> WordBoundaries | None:
    """Read the word boundaries from a `tokenizers` JSON. None: the tokenizer marks words in a way not supported here.

    - WordPiece: a token without `##` begins a word. Every punctuation character does, because the pre-tokenizer splits
      there.
    - Byte-level BPE: a token begins a word if it starts with a space, other whitespace, punctuation or a symbol, or if
      it follows one of the last three. The pre-tokenizer splits at these places too, and also between letters and
      digits, which stay together here.
    - SentencePiece: a token that starts with `▁` begins a word, and so do line breaks and what follows them.
      Punctuation does not split words. A pre-tokenizer has put the `▁`, or, as in Gemma's and Llama's, the normalizer.
    - Added tokens, including the unknown token, are words of their own.
    """
    state = json.loads(tokenizer_json)
    model, pre_tokenizers = state["model"], dict(_flatten(state["pre_tokenizer"]))
    vocabulary = model["vocab"]
    pieces: dict[str, int] = (
        vocabulary if isinstance(vocabulary, dict) else {piece: token for token, (piece, _) in enumerate(vocabulary)}
    )
    added = [token["id"] for token in state["added_tokens"]]
    begins, ends, spaces = np.zeros((3, max([*pieces.values(), *added]) + 1), dtype=np.bool_)
    ids = list(pieces.values())
    if prefix := model.get("continuing_subword_prefix"):
        begins[ids] = [not piece.startswith(prefix) for piece in pieces]
    elif model["type"] == "WordLevel":
        begins[ids] = True
    elif "ByteLevel" in pre_tokenizers:
        decode = ByteLevel().decode
        texts = [decode([piece]) for piece in pieces]  # U+FFFD for bytes that form no whole character
        begins[ids] = [text[:1] == " " or _splits_words(text[:1]) for text in texts]
        ends[ids] = [_splits_words(text[-1:]) for text in texts]
        spaces[ids] = [text == " " for text in texts]
    elif "Metaspace" in pre_tokenizers or _marks_spaces(state["normalizer"]):
        mark = pre_tokenizers.get("Metaspace", {}).get("replacement", "▁")
        begins[ids] = [piece.startswith(mark) or piece[:1].isspace() for piece in pieces]
        ends[ids] = [piece[-1:].isspace() for piece in pieces]
        spaces[ids] = [piece == mark for piece in pieces]
    else:
        return None
    begins[added] = ends[added] = True
    return WordBoundaries(begins, ends, spaces)


def _marks_spaces(normalizer: dict[str, Any] | None) -> bool:
    """Return whether a normalizer turns spaces into `▁`, or puts one before the text."""
    return any("▁" in (step.get("content"), step.get("prepend")) for _, step in _flatten(normalizer))


def _flatten(component: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (type, settings) of a normalizer or pre-tokenizer and, for a sequence, of its members."""
    if component is not None:
        yield component["type"], component
        for member in component.get("pretokenizers", component.get("normalizers", ())):
            yield from _flatten(member)


def _splits_words(character: str) -> bool:
    """Return True for punctuation, symbols, and whitespace other than the space, which belongs to the word after it."""
    if character in ("", " ", "\ufffd"):
        return False
    return character.isspace() or unicodedata.category(character)[0] in "PS"


def segmented_word_starts(
    text: str,
    ids: NDArray[np.integer[Any]],
    offsets: NDArray[np.int64],
    boundaries: WordBoundaries,
    segmenter: Segmenter,
) -> BoolArray:
    """Mark the tokens [T] of one text that begin a word, using the segmenter for Chinese.

    The segmenter decides for tokens that begin with a Chinese character or directly follow one; `boundaries` decide for
    the others. Of several tokens that share a character, only the first can begin a word.

    Args:
        ids: token ids, [T].
        offsets: index in `text` of each token's first character, and of the one after its last, [T, 2].
    """
    chinese = _is_chinese(text)
    segment_starts = np.zeros(len(chinese), dtype=np.bool_)
    segment_starts[np.cumsum([0, *map(len, segmenter(text))])[:-1]] = True
    first = np.minimum(offsets[:, 0], len(chinese) - 1)
    follows_chinese = chinese[first - 1] & (first > 0)
    # Tokens of bytes may begin in the middle of a character.
    begins_character = first >= np.concatenate([[0], offsets[:-1, 1]])
    starts: BoolArray = np.where(
        chinese[first] | follows_chinese, segment_starts[first] & begins_character, boundaries.word_starts(ids)
    )
    return boundaries.attach_spaces(starts, ids)


def _is_chinese(text: str) -> BoolArray:
    """Mark the characters of a text that are CJK ideographs; Japanese and Korean syllables are not included."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    found = np.zeros(len(characters), dtype=np.bool_)
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        found |= (characters >= first) & (characters <= last)
    return found
