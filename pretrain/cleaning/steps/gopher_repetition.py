"""Gopher's repetition rules (Rae et al. 2021, table A1), of datatrove."""

from typing import TYPE_CHECKING

import regex
from pydantic import PositiveInt

from experiment.config import Section
from experiment.config.field_types import Fraction, PositiveFraction
from experiment.unspaced_scripts import UNSPACED
from pretrain.cleaning.datatrove_step import FilterStep

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

_BESIDE_UNSPACED = regex.compile(rf" (?=\n[{UNSPACED}])| (?<=[{UNSPACED}]\p{{M}}* )")


class Config(Section):
    """Drop documents that repeat lines, paragraphs or n-grams, by Gopher's rules. null turns a rule off."""

    dup_line_frac: PositiveFraction | None = 0.3
    """Largest share of lines that repeat another one."""

    dup_para_frac: PositiveFraction | None = 0.3
    """Largest share of paragraphs that repeat another one."""

    dup_line_char_frac: PositiveFraction | None = 0.2
    """Largest share of characters in repeated lines."""

    dup_para_char_frac: PositiveFraction | None = 0.2
    """Largest share of characters in repeated paragraphs."""

    top_n_grams: tuple[tuple[PositiveInt, Fraction], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    """(n, largest share of characters in the most frequent n-gram)."""

    dup_n_grams: tuple[tuple[PositiveInt, Fraction], ...] = (
        *((5, 0.15), (6, 0.14), (7, 0.13)),
        *((8, 0.12), (9, 0.11), (10, 0.10)),
    )
    """(n, largest share of characters in all repeated n-grams)."""


class Step(FilterStep[Config]):
    config_type = Config
    filter_name = "GopherRepetitionFilter"

    def make_filter(self) -> "BaseFilter":
        from datatrove.pipeline.filters import gopher_repetition_filter

        gopher_repetition_filter.get_n_grams = _ngrams
        return super().make_filter()


def _ngrams(words: list[str], n: int) -> list[str]:
    """Return n-grams with spaces between words, as datatrove does, but not beside characters of scripts without spaces:
    the share of an n-gram would count characters that the text does not have."""
    pieces = _BESIDE_UNSPACED.sub("", " \n".join(words)).split("\n")
    return ["".join(pieces[start : start + n]).rstrip(" ") for start in range(len(words) - n + 1)]
