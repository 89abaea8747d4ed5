"""Rows -> token ids -> padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.tasks.kinds import TaskKind
from finetune.tasks.rows import Table

# Shape suffixes: B examples, T tokens of the longest of them.

_GROUP_BATCHES = 50  # batches whose examples are sorted by length together: little padding, and still random enough


@dataclass(frozen=True)
class Examples:
    """The tokenised rows of a split, in their order."""

    table: Table
    input_ids: tuple[Tensor, ...]  # T int64 each
    token_type_ids: tuple[Tensor, ...] | None  # None where the model has none
    targets: tuple[int, ...] | None  # None where the split has no labels
    truncated: int  # examples that lost tokens

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.input_ids]


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]  # what the model's forward takes, BT each
    targets: Tensor  # B; empty where the split has no labels


def make_examples(
    table: Table, kind: TaskKind, labels: Sequence[str], tokenizer: Any, max_length: int, token_types: bool
) -> Examples:
    """Tokenise every row; what is longer than `max_length` tokens loses tokens at the end of its longer text.

    Special tokens written out in a text are ordinary text. Raises UserError for a label that is not among `labels`.
    """
    texts = [kind.texts(row) for row in table.rows]
    columns = [list(column) for column in zip(*texts, strict=True)]
    options: dict[str, Any] = {"add_special_tokens": True, "split_special_tokens": True, "return_attention_mask": False}
    encoded = tokenizer(
        *columns,
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=token_types,
        **options,
    )
    full = [place for place, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
    whole = (
        tokenizer(*([column[place] for place in full] for column in columns), verbose=False, **options)
        if full
        else None
    )
    return Examples(
        table=table,
        input_ids=tuple(torch.tensor(ids) for ids in encoded["input_ids"]),
        token_type_ids=tuple(torch.tensor(ids) for ids in encoded["token_type_ids"]) if token_types else None,
        targets=tuple(kind.target(table, row, labels) for row in table.rows) if table.labelled else None,
        truncated=sum(len(ids) > max_length for ids in whole["input_ids"]) if whole else 0,
    )


def training_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """One epoch: every example once, in shuffled batches of examples of similar length."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    group = batch_size * _GROUP_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), group):
        by_length = sorted(shuffled[start : start + group], key=lambda place: lengths[place])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every example once, in batches of similar length, longest first: if they fit into memory, all do."""
    by_length = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]


def collate(examples: Examples, places: Sequence[int], pad_token_id: int, device: torch.device) -> Batch:
    """The examples at `places`, padded to the longest of them."""
    input_ids = [examples.input_ids[place] for place in places]
    lengths = torch.tensor([len(ids) for ids in input_ids])
    inputs = {"input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id)}
    inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if examples.token_type_ids is not None:
        inputs["token_type_ids"] = pad_sequence([examples.token_type_ids[place] for place in places], batch_first=True)
    targets = torch.tensor([] if examples.targets is None else [examples.targets[place] for place in places])
    return Batch(
        {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()},
        targets.to(device, non_blocking=True),
    )
