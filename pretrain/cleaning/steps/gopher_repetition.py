"""Gopher's repetition rules (Rae et al. 2021, table A1), of datatrove."""

from pydantic import PositiveInt

from experiment.config import Section
from experiment.config.field_types import Fraction
from pretrain.cleaning.datatrove_step import FilterStep


class Config(Section):
    """Drop documents that repeat lines, paragraphs or n-grams, by Gopher's rules. null turns a rule off."""

    dup_line_frac: Fraction | None = 0.3
    """Largest share of lines that repeat another one."""

    dup_para_frac: Fraction | None = 0.3
    """Largest share of paragraphs that repeat another one."""

    dup_line_char_frac: Fraction | None = 0.2
    """Largest share of characters in repeated lines."""

    dup_para_char_frac: Fraction | None = 0.2
    """Largest share of characters in repeated paragraphs."""

    top_n_grams: tuple[tuple[PositiveInt, Fraction], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    """(n, largest share of characters in the most frequent n-gram)."""

    dup_n_grams: tuple[tuple[PositiveInt, Fraction], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )
    """(n, largest share of characters in all repeated n-grams)."""


class Step(FilterStep[Config]):
    config_type = Config
    filter_name = "GopherRepetitionFilter"
