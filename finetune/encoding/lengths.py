"""The token lengths of the splits, printed before training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from finetune.encoding.encoded_split import Split

_PERCENTILES = (50, 90, 99)
_ROUND_TO = 8  # tensor cores prefer multiples of it
_ACCEPTABLE = 0.01  # share of sequences that may be cut without a suggestion


@dataclass(frozen=True)
class Lengths:
    """How long the sequences of a split are before they are cut."""

    tokens: NDArray[np.int64]
    share_cut: float

    @classmethod
    def of(cls, split: Split) -> "Lengths":
        sequences = [tokens for example in split.examples for tokens in example.sequences]
        return cls(
            np.array([tokens.full_length or len(tokens) for tokens in sequences]),
            sum(tokens.truncated for tokens in sequences) / len(sequences),
        )

    def percentile(self, percent: int) -> int:
        """At least this share of the sequences is not longer."""
        return int(np.percentile(self.tokens, percent, method="higher"))

    def row(self) -> dict[str, str]:
        percentiles = {f"{percent} %": f"{self.percentile(percent):,}" for percent in _PERCENTILES}
        return {**percentiles, "max": f"{self.tokens.max():,}", "cut": f"{self.share_cut:.1%}"}


def print_lengths(console: Console, splits: Mapping[str, Split], positions: int | None) -> None:
    """Print a table on a terminal, a line per split elsewhere, and perhaps a better length.

    positions: of the model; None if it has no limit.
    """
    lengths = {name: Lengths.of(split) for name, split in splits.items() if split.examples}
    rows = {name: found.row() for name, found in lengths.items()}
    if console.is_terminal:
        table = Table("tokens of a sequence", *next(iter(rows.values())))
        for name, row in rows.items():
            table.add_row(name, *row.values())
        console.print(table)
    else:
        for name, row in rows.items():
            figures = ", ".join(f"{title} {value}" for title, value in row.items())
            console.print(f"{name}: tokens of a sequence: {figures}", markup=False)
    if line := suggest_length(lengths, positions):
        console.print(line, markup=False)


def suggest_length(lengths: Mapping[str, Lengths], positions: int | None) -> str | None:
    """A line with a length that holds 99 % of each split, if more than 1 % of one is cut."""
    if all(found.share_cut <= _ACCEPTABLE for found in lengths.values()):
        return None
    needed = _ROUND_TO * math.ceil(max(found.percentile(99) for found in lengths.values()) / _ROUND_TO)
    if positions is not None and needed > positions:
        return f"99 % of the sequences have up to {needed:,} tokens, but the model has {positions:,} positions"
    return f"model.max_seq_length: {needed} would hold 99 % of the sequences"
