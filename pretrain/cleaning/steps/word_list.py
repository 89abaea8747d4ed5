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
from pretrain.cleaning.step import Document, DocumentStep, ReadTask, Verdict
from pretrain.corpus.words import UNSPACED


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

    def prepare(self, read_task: ReadTask) -> None:
        items = read_items(self.config.file, "steps: word_list.file")
        self.words = sorted({_normalize(word) for _, word in items if not word.startswith("#")})
        if not self.words:
            raise UserError(f"steps: word_list.file: {self.config.file} has no words")

    def facts(self) -> Mapping[str, Any]:
        """Return a digest of the words: an unfinished cleaning that has looked for others is refused."""
        return {"words": json_digest(self.words)}

    @cached_property
    def _pattern(self) -> regex.Pattern[str]:
        letter = rf"[^\W{UNSPACED}]"
        patterns = {"anywhere": r"\L<anywhere>", "whole": rf"(?<!{letter})\L<whole>(?!{letter})"}
        lists: dict[str, list[str]] = {}
        for word in self.words:
            is_whole = self.config.whole_words and not regex.search(rf"[{UNSPACED}]", word)
            lists.setdefault("whole" if is_whole else "anywhere", []).append(word)
        return regex.compile("|".join(patterns[name] for name in lists), regex.IGNORECASE | regex.FULLCASE, **lists)

    def apply(self, document: Document) -> Verdict | None:
        found = [match.group() for match in self._pattern.finditer(_normalize(document.text))]
        return Verdict("listed_word", detail=found[0]) if len(found) > self.config.max_count else None


def _normalize(text: str) -> str:
    return " ".join(text.replace("’", "'").split())
