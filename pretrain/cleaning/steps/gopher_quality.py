"""Gopher's quality rules (Rae et al. 2021, section A.1.1), of datatrove."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from experiment.config import Section
from experiment.config.field_types import Fraction, PositiveFraction
from pretrain.cleaning.datatrove_step import FilterStep
from pretrain.cleaning.words import Words


class Config(Section):
    """Drop documents by Gopher's quality rules: length, symbols, bullets and stop words. null turns a rule off."""

    min_doc_words: NonNegativeInt | None = 50
    """Fewest words, without punctuation."""

    max_doc_words: PositiveInt | None = 100_000
    """Most words, without punctuation."""

    min_avg_word_length: NonNegativeFloat | None = 3
    """Smallest mean length of a word in characters; null for scripts without spaces."""

    max_avg_word_length: PositiveFloat | None = 10
    """Largest mean length of a word in characters."""

    max_symbol_word_ratio: PositiveFloat | None = 0.1
    """Largest number of `#`, or of ellipses, per word."""

    max_bullet_lines_ratio: PositiveFraction | None = 0.9
    """Largest share of lines that begin with a bullet point."""

    max_ellipsis_lines_ratio: PositiveFraction | None = 0.3
    """Largest share of lines that end with an ellipsis."""

    max_non_alpha_words_ratio: Fraction | None = 0.8
    """Smallest share of words with a letter; the name is datatrove's."""

    min_stop_words: NonNegativeInt | None = 2
    """Fewest different stop words."""

    stop_words: Words | None = None
    """Stop words, in Chinese single characters; null: the eight English ones of Gopher."""


class Step(FilterStep[Config]):
    config_type = Config
    filter_name = "GopherQualityFilter"
