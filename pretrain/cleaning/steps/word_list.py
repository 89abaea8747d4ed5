"""Documents with words of a list."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import regex
from pydantic import NonNegativeInt

from experiment.config import Section
from experiment.config.field_types import PathText
from experiment.errors import UserError
from experiment.files import json_digest, read_items
from experiment.unspaced_scripts import UNSPACED
from pretrain.cleaning.step import Document, DocumentStep, ReadTask, Verdict

_LETTER = regex.compile(rf"[^\W{UNSPACED}]")


class Config(Section):
    """Drop documents with words or phrases of a list."""

    file: PathText
    """Words and phrases, one per line; lines that begin with `#` are comments. Case does not count, nor
    which spaces or line breaks separate the words of a phrase, and whether an apostrophe is ' or ’."""

    max_count: NonNegativeInt = 0
    """Occurrences that a document may have."""

    whole_words: bool = True
    """Match whole words only. Words of scripts without spaces, such as Chinese, match anywhere."""


class Step(DocumentStep[Config]):
    config_type = Config
    packages = ("ahocorasick",)

    def prepare(self, read_task: ReadTask) -> None:
        items = read_items(self.config.file, "steps: word_list.file")
        self.words = sorted({_normalize(word).lower() for _, word in items if not word.startswith("#")})
        if not self.words:
            raise UserError(f"steps: word_list.file: {self.config.file} has no words")

    def facts(self) -> Mapping[str, Any]:
        """Return a digest of the words: a cleaning that has looked for others is refused."""
        return {"words": json_digest(self.words)}

    @cached_property
    def _automaton(self) -> Any:
        import ahocorasick

        automaton = ahocorasick.Automaton()
        capitals = {word.replace("ß", "ss") for word in self.words}.difference(self.words)  # STRASSE of Straße
        for word in (*self.words, *capitals):
            is_whole = self.config.whole_words and not regex.search(rf"[{UNSPACED}]", word)
            automaton.add_word(word, (word, is_whole, word in capitals))
        automaton.make_automaton()
        return automaton

    def apply(self, document: Document) -> Verdict | None:
        text, found, end = _normalize(document.text), list[str](), 0
        for last, (word, is_whole, in_capitals) in self._automaton.iter(text.lower()):
            start = last + 1 - len(word)
            if start < end or (is_whole and _LETTER.search(text[start - 1 : start] + text[last + 1 : last + 2])):
                continue
            if in_capitals and not text[start : last + 1].isupper():
                continue
            found.append(word)
            if len(found) > self.config.max_count:
                return Verdict("listed_word", detail=found[0])
            end = last + 1
        return None


def _normalize(text: str) -> str:
    # In lower case, İ is i and a dot above; all other characters stay one.
    text = text.replace("İ", "I").replace("I\u0307", "I").replace("i\u0307", "i")
    return " ".join(text.replace("’", "'").split())
