"""Shares of digits, symbols, capital letters and stop words."""

from functools import cached_property

import regex

from experiment.config import Section
from experiment.config.field_types import Fraction
from pretrain.cleaning.step import Document, DocumentStep, Verdict
from pretrain.cleaning.words import Words, normalized_words

# Of Gopher (Rae et al. 2021), with the most frequent function words of English.
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with", "a", "in", "is", "it", "for", "was", "i")
_MARK = regex.compile(r"\p{M}")  # of a letter, such as a vowel sign of Hindi


class Config(Section):
    """Drop documents with too many digits, symbols or capital letters, or with too few stop words."""

    max_digits: Fraction = 1.0
    """Largest share of digits among the characters that are not spaces."""

    max_symbols: Fraction = 1.0
    """Largest share of characters that are not letters with their marks, digits, or spaces."""

    max_capitals: Fraction = 1.0
    """Largest share of capital letters among the letters."""

    min_stop_words: Fraction = 0.0
    """Smallest share of stop words among the words."""

    stop_words: Words = _STOP_WORDS
    """Stop words, whatever case and diacritics; in Chinese, single characters."""


class Step(DocumentStep[Config]):
    config_type = Config

    @cached_property
    def _stop_words(self) -> frozenset[str]:
        return frozenset(normalized_words(" ".join(self.config.stop_words)))

    def apply(self, document: Document) -> Verdict | None:
        characters = [character for character in document.text if not character.isspace()]
        digits = sum(map(str.isdigit, characters))
        letters = sum(map(str.isalpha, characters))
        marks = len(_MARK.findall(document.text))
        shares = {
            "digits": digits / max(len(characters), 1),
            "symbols": (len(characters) - digits - letters - marks) / max(len(characters), 1),
            "capitals": sum(map(str.isupper, characters)) / max(letters, 1),
        }
        for name, share in shares.items():
            if share > getattr(self.config, f"max_{name}"):
                return Verdict(f"too_many_{name}", detail=f"{share:.2f}")
        if self.config.min_stop_words > 0:
            words = normalized_words(document.text)
            share = sum(word in self._stop_words for word in words) / max(len(words), 1)
            if share < self.config.min_stop_words:
                return Verdict("too_few_stop_words", detail=f"{share:.2f}")
        return None
