"""The rules of C4 (Raffel et al. 2020, section 2.2), of datatrove."""

from pydantic import Field

from experiment.config import Section
from pretrain.cleaning.datatrove_step import FilterStep


class Config(Section):
    """Remove lines that are no sentences, and drop documents with few sentences, code or `lorem ipsum`, as C4 did."""

    split_paragraph: bool = True
    """Check each line; false: each sentence, and join those that are kept with spaces, also in Chinese."""

    remove_citations: bool = True
    """Remove citations such as `[1]`."""

    filter_no_terminal_punct: bool = True
    """Remove lines without a punctuation mark at the end."""

    min_num_sentences: int = Field(5, ge=-1)
    """Fewest sentences of a document; -1: any."""

    min_words_per_line: int = Field(3, ge=-1)
    """Fewest words of a line; -1: any."""

    max_word_length: int = Field(1000, ge=-1)
    """Remove lines with a longer word; -1: none."""

    filter_lorem_ipsum: bool = True
    """Drop documents with `lorem ipsum`."""

    filter_javascript: bool = True
    """Remove lines with `javascript`."""

    filter_curly_bracket: bool = True
    """Drop documents with a curly bracket."""

    filter_policy: bool = True
    """Remove lines about cookies, privacy or terms of use."""


class Step(FilterStep[Config]):
    config_type = Config
    filter_name = "C4QualityFilter"
