"""Lengths of documents, and scripts of letters."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import regex
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pretrain.corpus.reader import Corpus
from pretrain.inspection.sample import SampledDocument

SCRIPT_TOKENS = 256  # of a document whose letters are counted
_OTHER, _RARE = "other", 0.001

# Unicode's names of scripts (https://www.unicode.org/Public/UNIDATA/Scripts.txt) in which much text is written.
_SCRIPTS = (
    *("Latin", "Han", "Cyrillic", "Arabic", "Devanagari", "Hangul", "Hiragana", "Katakana", "Greek", "Hebrew", "Thai"),
    *("Bengali", "Tamil", "Telugu", "Gujarati", "Kannada", "Malayalam", "Gurmukhi", "Sinhala", "Georgian", "Armenian"),
    *("Ethiopic", "Khmer", "Lao", "Myanmar", "Tibetan", "Mongolian", "Bopomofo"),
)
_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in _SCRIPTS))


def count_lengths(corpus: Corpus) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the lengths of documents in tokens that occur, ascending, and how many documents have each: [L], [L].

    Reads all shards' offsets: 4 bytes per document.
    """
    counts: Counter[int] = Counter()
    for lengths in corpus.document_lengths():
        counts.update(lengths.tolist())
    lengths, times = np.array(sorted(counts.items()), dtype=np.int64).T
    return lengths, times


def script_shares(documents: Iterable[SampledDocument], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
    """Return the share of each script among the letters of documents, falling. Less than 0.1 % is left out."""
    beginnings = [document.ids[:SCRIPT_TOKENS].tolist() for document in documents]
    texts = tokenizer.batch_decode(beginnings, skip_special_tokens=True)  # [UNK] has letters too
    letters = Counter(character for text in texts for character in text if character.isalpha())
    scripts: Counter[str] = Counter()
    for letter, times in letters.items():
        found = _SCRIPT.match(letter)
        scripts[str(found.lastgroup) if found else _OTHER] += times
    return [(name, share) for name, times in scripts.most_common() if (share := times / letters.total()) >= _RARE]
