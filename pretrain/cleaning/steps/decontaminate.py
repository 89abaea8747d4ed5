"""Remove the evaluation data of a model, found by shared n-grams (Brown et al. 2020, appendix C)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import regex
import xxhash
from pydantic import Field, PositiveInt

from experiment.config import Section
from experiment.decontamination import texts_digests
from pretrain.cleaning.step import Document, DocumentStep, ReadTask, Verdict
from pretrain.cleaning.words import CLOSING, count_words, divided_words, normalized_words, word_spans

_SHOWN = 30  # words of a match
_LINE = regex.compile(r"\S[^\n]*")
_SENTENCE = regex.compile(rf"[^\n.!?…。！？]*(?:[.!?…。！？]+[{CLOSING}]*|\n|$)\s*")


class Config(Section):
    """Drop or cut documents that share n-grams with the validation and test texts of fine-tuning tasks."""

    against: Annotated[tuple[str, ...], Field(min_length=1)]
    """Fine-tuning configs: paths, or names of recipes such as `sst2`."""

    ngram: PositiveInt = 13
    """Words of an n-gram, without case, punctuation and diacritics; `it's` and `it 's` are two words, and two
    characters of a script without spaces one. A shorter text matches as a whole."""

    min_words: PositiveInt = 5
    """A text with fewer words, counted in the same way except that `it's` is one, matches only as a whole line of a
    document, of which the other lines are kept."""

    action: Literal["drop", "cut"] = "drop"
    """Drop documents that match, or cut the sentences that do."""


class Match(NamedTuple):
    start: int  # in words of the document
    end: int
    text: int  # index of the evaluation text
    line: slice | None = None  # of the document, if it matches as a whole


class Index:
    """The n-grams of evaluation texts. Lookups begin with the first words of an n-gram, because texts shorter than an
    n-gram are n-grams of other lengths."""

    def __init__(self, texts: Sequence[str], ngram: int, min_words: int) -> None:
        self._head = min(ngram, min_words)
        self._lengths: dict[int, tuple[int, ...]] = {}  # hash of the first words -> lengths of n-grams, longest first
        self._ngrams: dict[int, int] = {}  # hash -> the first text that has it
        self._lines: dict[str, int] = {}  # of fewer words
        shared = dict[tuple[int, ...], tuple[int, ...]]()  # equal lengths are one object
        for number, text in enumerate(texts):
            words = divided_words(text)
            counts = np.cumsum([0, *(count_words([word]) for word in words)])
            if counts[-1] >= ngram or count_words(normalized_words(text)) >= min_words:
                ends = np.searchsorted(counts, counts + min(counts[-1], ngram))
                for start, end in enumerate(ends[ends <= len(words)].tolist()):
                    head = _hash(words[start : start + self._head])
                    lengths = tuple(sorted({end - start, *self._lengths.get(head, ())}, reverse=True))
                    self._lengths[head] = shared.setdefault(lengths, lengths)
                    self._ngrams.setdefault(_hash(words[start:end]), number)
            elif words:
                self._lines.setdefault(" ".join(words), number)

    def matches(self, text: str) -> Iterator[Match]:
        """Yield all matches in a document, in order of their first words; whole lines last."""
        words = divided_words(text)
        for start in range(len(words) - self._head + 1):
            for length in self._lengths.get(_hash(words[start : start + self._head]), ()):
                found = self._ngrams.get(_hash(words[start : start + length]))
                if found is not None and start + length <= len(words):
                    yield Match(start, start + length, found)
        if self._lines:
            start = 0
            for line in _LINE.finditer(text):
                line_words = divided_words(line.group())
                found = self._lines.get(" ".join(line_words))
                if found is not None:
                    yield Match(start, start + len(line_words), found, slice(*line.span()))
                start += len(line_words)


class Step(DocumentStep[Config]):
    config_type = Config
    needs_repaired = True
    lists_matches = True

    def prepare(self, read_task: ReadTask) -> None:
        tasks = {name: read_task(name) for name in self.config.against}
        self._digests = {
            f"{name} {split}": digest for name, texts in tasks.items() for split, digest in texts_digests(texts).items()
        }
        self._places = [f"{name} {text.split}, {text.place}" for name, texts in tasks.items() for text in texts]
        evaluated = [text.text for texts in tasks.values() for text in texts]
        self._index = Index(evaluated, self.config.ngram, self.config.min_words)

    def facts(self) -> Mapping[str, Any]:
        """Return what is compared: a cleaning that has compared other words is refused."""
        return {"against": self._digests}

    def apply(self, document: Document) -> Verdict | None:
        matches = self._index.matches(document.text)
        first = next(matches, None)
        if first is None:
            return None
        words = divided_words(document.text)
        detail = f"{self._places[first.text]}: {' '.join(words[first.start : first.end][:_SHOWN])}"
        is_dropped = self.config.action == "drop"
        if is_dropped and (first.line is None or first.end - first.start == len(words)):
            return Verdict("contaminated", detail=detail)
        document.text = _cut(document.text, [first, *matches])
        return Verdict(f"contaminated_{'lines' if is_dropped else 'sentences'}", dropped=False, detail=detail)


def _cut(text: str, matches: Sequence[Match]) -> str:
    """Return the text without the sentences that overlap a match."""
    spans, matched = word_spans(text), np.zeros(len(text), bool)
    for match in matches:
        matched[match.line or slice(spans[match.start][0], spans[match.end - 1][1])] = True
    sentences = (sentence.span() for sentence in _SENTENCE.finditer(text))
    return "".join(text[start:end] for start, end in sentences if not matched[start:end].any()).strip()


def _hash(words: Sequence[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(words).encode())
