"""Where words begin in a stream of tokens: by the tokenizer's own marks, and in Chinese by a segmenter.

WordPiece marks what continues a word (`##ing`), byte-level BPE and SentencePiece mark what follows a space (`Ġword`,
`▁word`). Chinese has no spaces, and BERT's WordPiece makes each of its characters a word. A segmenter finds the real
words in the raw text, which is there only while a corpus is built.
"""

import hashlib
import json
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.errors import UserError

Flags = NDArray[np.bool_]
Cut = Callable[[str], Iterator[str]]  # text -> its words, which make up the text

SEGMENTERS = ("jieba",)


@dataclass(frozen=True)
class WordMarks:
    """What the tokens themselves say of words."""

    begins: Flags  # [largest id + 1] a word begins with this token
    ends: Flags  # [largest id + 1] a word begins after this token
    opens: Flags  # [largest id + 1] this token is a space alone, which belongs to what follows it

    def starts(self, ids: NDArray[np.integer[Any]]) -> Flags:
        """Which tokens [T] of a text begin a word; the first always does."""
        found: Flags = self.begins[ids]
        found[1:] |= self.ends[ids[:-1]]
        return self.joined(found, ids)

    def joined(self, starts: Flags, ids: NDArray[np.integer[Any]]) -> Flags:
        """Word starts [T], changed in place: none after a lone space, one at the first token."""
        starts[1:] &= ~self.opens[ids[:-1]]
        starts[:1] = True
        return starts


def word_marks(tokenizer_json: str) -> WordMarks | None:
    """The marks of a tokenizer in `tokenizers`' JSON; None for one that marks words in no known way.

    WordPiece: a token without `##` begins a word; so does each punctuation character, which its pre-tokenizer cuts out.
    Byte-level BPE: a token begins a word if it begins with a space, other white space, punctuation or a symbol, or
    follows one of the latter three, which is where its pre-tokenizer cuts, but that letters and digits stay together.
    SentencePiece: a token that begins with `▁`, whatever punctuation is in the word. Added tokens, the unknown token
    among them, are words of their own.
    """
    state = json.loads(tokenizer_json)
    model, kinds = state["model"], dict(_parts(state["pre_tokenizer"]))
    vocabulary = model["vocab"]
    pieces: dict[str, int] = (
        vocabulary if isinstance(vocabulary, dict) else {piece: token for token, (piece, _) in enumerate(vocabulary)}
    )
    added = [token["id"] for token in state["added_tokens"]]
    begins, ends, opens = np.zeros((3, max([*pieces.values(), *added]) + 1), dtype=np.bool_)
    ids = list(pieces.values())
    if continuing := model.get("continuing_subword_prefix"):
        begins[ids] = [not piece.startswith(continuing) for piece in pieces]
    elif model["type"] == "WordLevel":
        begins[ids] = True
    elif "ByteLevel" in kinds:
        texts = [_text_of(piece) for piece in pieces]
        begins[ids] = [text[:1] == " " or _is_apart(text[:1]) for text in texts]
        ends[ids] = [_is_apart(text[-1:]) for text in texts]
        opens[ids] = [text == " " for text in texts]
    elif "Metaspace" in kinds:
        space = kinds["Metaspace"]["replacement"]
        begins[ids] = [piece.startswith(space) for piece in pieces]
        opens[ids] = [piece == space for piece in pieces]
    else:
        return None
    begins[added] = ends[added] = True
    return WordMarks(begins, ends, opens)


def _parts(pre_tokenizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(type, settings) of a pre-tokenizer and of those that it is a sequence of."""
    if pre_tokenizer is not None:
        yield pre_tokenizer["type"], pre_tokenizer
        for part in pre_tokenizer.get("pretokenizers", ()):
            yield from _parts(part)


def _text_of(piece: str) -> str:
    """The text of a byte-level token, U+FFFD for bytes that are no whole character.

    GPT-2 (Radford et al. 2019) writes the printable bytes of Latin-1 as themselves, the others as U+0100 and up.
    """
    return bytes(_BYTES.get(character, 0) for character in piece).decode(errors="replace")


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}


def _is_apart(character: str) -> bool:
    """White space (but for the space, which belongs to what follows it), punctuation and symbols."""
    if character in ("", " ", "\ufffd"):
        return False
    return character.isspace() or unicodedata.category(character)[0] in "PS"


def segmented_starts(
    text: str, ids: NDArray[np.integer[Any]], offsets: NDArray[np.int64], marks: WordMarks, cut: Cut
) -> Flags:
    """Which tokens [T] of a text begin a word, the segmenter's in Chinese. `offsets` [T]: of their first characters.

    The segmenter decides about tokens that begin with a Chinese character or right after one, the tokenizer's marks
    about all others. Of several tokens that share a character the first can begin a word.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    chinese = _is_chinese(characters)
    begins = np.zeros(len(characters), dtype=np.bool_)
    begins[np.cumsum([0, *map(len, cut(text))])[:-1]] = True
    places = np.minimum(offsets, len(characters) - 1)
    after_chinese = chinese[places - 1] & (places > 0)
    first_of_character = np.diff(places, prepend=-1) != 0
    starts: Flags = np.where(chinese[places] | after_chinese, begins[places] & first_of_character, marks.starts(ids))
    return marks.joined(starts, ids)


def _is_chinese(characters: NDArray[np.uint32]) -> Flags:
    """CJK ideographs, by code point; not the syllables of Japanese and Korean."""
    found = np.zeros(len(characters), dtype=np.bool_)
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        found |= (characters >= first) & (characters <= last)
    return found


def segmenter_identity(name: str) -> str:
    """What decides about a segmenter's words: its version and dictionary. Raises UserError where it is missing."""
    jieba = _import_jieba()
    return f"{name} {jieba.__version__}, dictionary {hashlib.sha256(_dictionary(jieba).read_bytes()).hexdigest()[:16]}"


def open_segmenter(name: str) -> Cut:
    """jieba in its default mode: the likeliest cut into words of its dictionary, and a hidden Markov model for others.

    The dictionary is read here and not by jieba, which would take it from a file in the folder for temporary files,
    whoever wrote that, and log what it does. Raises UserError where jieba is missing.
    """
    assert name in SEGMENTERS
    jieba = _import_jieba()
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = jieba.Tokenizer.gen_pfdict(_dictionary(jieba).open("rb"))
    tokenizer.initialized = True
    return lambda text: tokenizer.cut(text, cut_all=False, HMM=True)


def _import_jieba() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in its regular expressions, and pkg_resources
            import jieba
    except ImportError:
        raise UserError("--segmenter jieba needs the package jieba: pip install jieba") from None
    module: ModuleType = jieba
    return module


def _dictionary(jieba: ModuleType) -> Path:
    return Path(str(jieba.__file__)).with_name("dict.txt")
