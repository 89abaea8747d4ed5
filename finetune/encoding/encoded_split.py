"""The examples of a split, and padded batches of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from finetune.data.records import Record, Table
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch, Example, Padding, pad_sequences
from finetune.task_kind import TaskKind


@dataclass(frozen=True)
class Split:
    """The records of a split and their examples, in order."""

    table: Table
    examples: tuple[Example, ...]
    record_of: tuple[int, ...]  # of each example, the index of its record

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each example."""
        return [example.longest for example in self.examples]


def encode_split(
    table: Table,
    kind: TaskKind[Any],
    encoder: Encoder,
    training: bool,
    progress: Callable[[Sequence[Record]], Iterable[Record]] = iter,
) -> Split:
    """The examples of all records. progress: shows the progress of an iteration. Raises UserError for an invalid
    target."""
    expanded = [kind.expand(record, encoder, training) for record in progress(table.records)]
    return Split(
        table,
        examples=tuple(example for examples in expanded for example in examples),
        record_of=tuple(index for index, examples in enumerate(expanded) for _ in examples),
    )


def collate(kind: TaskKind[Any], examples: Sequence[Example], padding: Padding, device: torch.device) -> Batch:
    """A batch of all sequences of the examples, padded to the longest of them."""
    inputs = pad_sequences([tokens for example in examples for tokens in example.sequences], padding, device)
    targets = None if any(example.target is None for example in examples) else kind.targets(examples, padding)
    return Batch(tuple(examples), inputs, None if targets is None else targets.to(device, non_blocking=True))
