"""Deduplication of lines and paragraphs, as in CCNet (Wenzek et al. 2020)."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt

from experiment.config import Section
from pretrain.cleaning.arrays import split_by_part
from pretrain.cleaning.step import Arrays, CollectionStep, Document, Observed, Verdict

_SEPARATORS = {"line": r"(\n)", "paragraph": r"(\n(?:[^\S\n]*\n)+)"}


class Config(Section):
    """Remove lines or paragraphs that recur in the collection, except their first occurrences."""

    unit: Literal["line", "paragraph"] = "line"
    """Unit of comparison: lines, or blocks between blank lines."""

    max_count: PositiveInt = 1
    """Occurrences that are kept, the first ones."""

    min_characters: NonNegativeInt = 20
    """Shorter lines are kept, such as `Yes.` in a dialogue."""


class Step(CollectionStep[Config]):
    config_type = Config

    def observe(self, documents: Sequence[Document]) -> Arrays:
        units = [self._split(document.text)[::2] for document in documents]
        shortest = max(self.config.min_characters, 1)
        # Blank and short lines get a number of their own, which is never compared.
        hashes = [
            xxhash.xxh3_64_intdigest(unit.encode()) | 1 if len(unit.strip()) >= shortest else 0
            for part in units
            for unit in part
        ]
        return {"hashes": np.array(hashes, np.uint64)}

    def decide(self, observed: Observed) -> list[NDArray[Any]]:
        parts = observed("hashes")
        removed = np.concatenate([part[:] != 0 for part in parts])  # first: those that are compared
        hashes = np.concatenate([values[values != 0] for part in parts for values in [part[:]]])
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        kept = self.config.max_count
        recurs = np.zeros(len(order), bool)
        recurs[order[kept:]] = hashes[kept:] == hashes[:-kept]  # its own and as many before it
        removed[removed] = recurs
        return split_by_part(removed, list(map(len, parts)))

    def apply(self, documents: Sequence[Document], decisions: NDArray[Any]) -> list[Verdict | None]:
        verdicts: list[Verdict | None] = []
        start = 0
        for document in documents:
            parts = self._split(document.text)
            units, separators = parts[::2], [*parts[1::2], ""]
            removed = decisions[start : start + len(units)]
            start += len(units)
            if not removed.any():
                verdicts.append(None)
                continue
            first = units[int(np.flatnonzero(removed)[0])].strip()
            kept = [(unit, end) for unit, end, gone in zip(units, separators, removed, strict=True) if not gone]
            text = "".join(unit + end for unit, end in kept)
            document.text = text.removesuffix(kept[-1][1]) if kept else ""
            left = bool(document.text.strip())
            rule = f"recurring_{self.config.unit}s" if left else f"only_recurring_{self.config.unit}s"
            verdicts.append(Verdict(rule, not left, first))
        return verdicts

    def _split(self, text: str) -> list[str]:
        """Units, and the separators between them."""
        return re.split(_SEPARATORS[self.config.unit], text)
