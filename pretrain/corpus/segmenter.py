"""Divide Chinese text into words with jieba, which `pip install 'deepcloze[chinese]'` installs."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from experiment.errors import UserError, notify
from experiment.files import read_items
from experiment.formatting import counted

Segmenter = Callable[[str], Iterator[str]]  # text -> its words, which joined give the text again


class SegmenterSpec(NamedTuple):
    """Plain data of a segmenter, jieba, for a worker, which can be pickled."""

    user_dictionary: str = ""  # lines of `word [frequency] [tag]`, as jieba reads them


def read_segmenter(user_dictionary: str | Path | None) -> SegmenterSpec:
    """Return the spec of the segmenter with the words of a file, one per line. Leaves out words that jieba never finds,
    with a warning: it splits text at other characters first. Raises UserError."""
    if user_dictionary is None:
        return SegmenterSpec()
    items = read_items(user_dictionary, "--user_dictionary")
    entries = [(number, " ".join(item.split())) for number, item in items]  # jieba separates columns at single spaces
    jieba = _import_jieba()
    words = [(number, entry, jieba.re_userdict.match(entry)[1]) for number, entry in entries]
    found = [entry for _, entry, word in words if jieba.re_han_default.fullmatch(word)]
    if not found:
        raise UserError(f"--user_dictionary: {user_dictionary} has no words that jieba finds; expected one per line")
    if len(found) < len(words):
        number, _, word = next(entry for entry in words if not jieba.re_han_default.fullmatch(entry[2]))
        notify(
            f"warning: --user_dictionary: left out {counted(len(words) - len(found), 'word')} of {user_dictionary} "
            f"that jieba never finds, such as '{word}' in line {number}: it splits text at all characters but U+4E00 "
            "to U+9FD5, letters and digits of ASCII, and + # & . _ % -"
        )
    return SegmenterSpec("\n".join(found))


def segmenter_identity(spec: SegmenterSpec) -> str:
    """Return the segmenter's version and the hashes of its dictionaries, which determine its words. Raises UserError if
    it is missing."""
    jieba = _import_jieba()
    user = f", user dictionary {_digest(spec.user_dictionary.encode())}" if spec.user_dictionary else ""
    return f"jieba {jieba.__version__}, dictionary {_digest(_dictionary(jieba).read_bytes())}{user}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def load_segmenter(spec: SegmenterSpec) -> Segmenter:
    """Load jieba in its default mode: the most likely split into dictionary words, and an HMM for unknown words.

    The dictionary is read here because jieba itself would log, and would load a cache from the temporary folder that
    anyone may have written. Raises UserError if jieba is missing.
    """
    jieba = _import_jieba()
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = jieba.Tokenizer.gen_pfdict(_dictionary(jieba).open("rb"))
    tokenizer.initialized = True
    if spec.user_dictionary:
        tokenizer.load_userdict(io.StringIO(spec.user_dictionary))
    return lambda text: tokenizer.cut(text, cut_all=False, HMM=True)


def _import_jieba() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba has invalid escapes and imports pkg_resources
            import jieba
    except ImportError:
        raise UserError("--segmenter: jieba not installed; run: pip install 'deepcloze[chinese]'") from None
    module: ModuleType = jieba
    return module


def _dictionary(jieba: ModuleType) -> Path:
    return Path(str(jieba.__file__)).with_name("dict.txt")
