"""Sampling, by a hash of each document: which are kept does not depend on the others."""

import json
from collections.abc import Mapping
from typing import Self

import xxhash
from pydantic import model_validator

from experiment.config import Section
from experiment.config.field_types import Fraction, PositiveFraction, Seed
from experiment.csv_and_jsonl import unexpected_cell
from pretrain.cleaning.step import Document, DocumentStep, Verdict

_RANGE = 1 << 64


class Config(Section):
    """Keep documents at random: each with the same probability, or by source, language or another column."""

    rate: PositiveFraction = 1.0
    """Probability of keeping a document."""

    by: str | None = None
    """Keys of `rates`: `source`, `language`, or a column in `metadata`."""

    rates: Mapping[str, Fraction] = {}
    """Probability by value of `by`, in place of `rate`; for sources: by a part of the name."""

    weight: str | None = None
    """Column in `metadata` with a number; it multiplies the probability of a document, up to 1."""

    seed: Seed = 42
    """Seed of the draws."""

    @model_validator(mode="after")
    def _rates_have_keys(self) -> Self:
        if self.rates and self.by is None:
            raise ValueError("rates needs by, which tells their keys, such as `by: language`")
        return self


class Step(DocumentStep[Config]):
    config_type = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = tuple(key for key in (config.by, config.weight) if key is not None)

    def apply(self, document: Document) -> Verdict | None:
        draw = xxhash.xxh3_64_intdigest(document.id.encode(), seed=self.config.seed) / _RANGE
        return Verdict("not_sampled") if draw >= self._rate(document) else None

    def _rate(self, document: Document) -> float:
        rate = self.config.rate
        if self.config.by == "source":
            rate = next((value for part, value in self.config.rates.items() if part in document.source), rate)
        elif self.config.by is not None:
            names = _names(document.metadata.get(self.config.by))
            rate = next((self.config.rates[name] for name in names if name in self.config.rates), rate)
        if self.config.weight is not None:
            rate *= _number(document, self.config.weight)
        return rate


def _names(value: object) -> tuple[str, ...]:
    """Return how a key of `rates` may give the value: true, false and null as in YAML; 2.0 also as 2."""
    if value is None or isinstance(value, bool):
        return (json.dumps(value),)
    return (str(value), f"{value:.0f}") if isinstance(value, float) and value.is_integer() else (str(value),)


def _number(document: Document, column: str) -> float:
    value = document.metadata.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise unexpected_cell(document.id, column, value, "a number >= 0")
    return float(value)
