"""Limits on the length of documents."""

from typing import Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from experiment.config import Section
from pretrain.cleaning.step import Document, DocumentStep, Verdict
from pretrain.cleaning.words import normalized_words


class Config(Section):
    """Drop documents that are too short or too long."""

    min_characters: NonNegativeInt = 0
    """Fewest characters."""

    max_characters: PositiveInt | None = None
    """Most characters; null: no limit."""

    min_words: NonNegativeInt = 0
    """Fewest words, without punctuation."""

    max_words: PositiveInt | None = None
    """Most words; null: no limit."""

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Self:
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and least > most:
                raise ValueError(f"min_{unit} ({least}) is more than max_{unit} ({most}): nothing would be left")
        return self


class Step(DocumentStep[Config]):
    config_type = Config

    def apply(self, document: Document) -> Verdict | None:
        limits = self.config
        if rule := _outside(len(document.text), limits.min_characters, limits.max_characters):
            return Verdict(f"{rule}_characters")
        if limits.min_words or limits.max_words is not None:
            count = len(normalized_words(document.text))
            if rule := _outside(count, limits.min_words, limits.max_words):
                return Verdict(f"{rule}_words")
        return None


def _outside(count: int, least: int, most: int | None) -> str:
    return "too_few" if count < least else "too_many" if most is not None and count > most else ""
