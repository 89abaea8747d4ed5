"""The rules that FineWeb adds (Penedo et al. 2024, section 3.6), of datatrove."""

from pydantic import NonNegativeFloat, NonNegativeInt

from experiment.config import Section
from experiment.config.field_types import Fraction
from pretrain.cleaning.datatrove_step import FilterStep


class Config(Section):
    """Drop documents that look like lists, by FineWeb's rules."""

    line_punct_thr: Fraction = 0.12
    """Smallest share of lines that end with a punctuation mark."""

    line_punct_exclude_zero: bool = False
    """Keep documents without any such line."""

    short_line_thr: Fraction = 0.67
    """Largest share of short lines."""

    short_line_length: NonNegativeInt = 30
    """Most characters of a short line."""

    char_duplicates_ratio: Fraction = 0.01
    """Largest share of characters in repeated lines."""

    new_line_ratio: NonNegativeFloat = 0.3
    """Largest number of line breaks per word."""


class Step(FilterStep[Config]):
    config_type = Config
    filter_name = "FineWebQualityFilter"
