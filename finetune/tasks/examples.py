"""Table rows to token ids to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from finetune.tasks.kinds import TaskKind
from finetune.tasks.rows import TaskTable

# Shape suffixes: B examples, T tokens of the longest of them.

_SORTED_BATCHES = 50  # examples of this many batches are sorted by length together: less padding, still random


@dataclass(frozen=True)
class Examples:
    """The tokenized rows of a split, in order."""

    table: TaskTable
    input_ids: tuple[Tensor, ...]  # T int64 each
    token_type_ids: tuple[Tensor, ...] | None  # None if the model has none
    targets: tuple[int, ...] | None  # None if the split has no labels
    truncated: int  # number of examples that were cut

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.input_ids]


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]  # arguments of the model's forward, BT each
    targets: Tensor  # B; empty if the split has no labels


def tokenize(
    table: TaskTable,
    kind: TaskKind,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    token_types: bool,
) -> Examples:
    """Tokenize every row. If it is longer than `max_length` tokens, the longer text of a pair is cut at its end.

    Special tokens written out in a text are ordinary text. Raises UserError for a label that is not in `labels`.
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
    # Tokenize those of full length again, without truncation, to see which were cut.
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
    whole = (
        tokenizer(*([column[index] for index in full] for column in columns), verbose=False, **options)
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


def training_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """The examples of one epoch by index: each once, in shuffled batches of similar length."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    group = batch_size * _SORTED_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), group):
        by_length = sorted(shuffled[start : start + group], key=lambda index: lengths[index])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All examples by index, in batches of similar length. The longest come first, to run out of memory early if at
    all."""
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]


def collate(examples: Examples, indices: Sequence[int], pad_token_id: int, device: torch.device) -> Batch:
    """The examples at `indices`, padded to the longest of them."""
    input_ids = [examples.input_ids[index] for index in indices]
    lengths = torch.tensor([len(ids) for ids in input_ids])
    inputs = {"input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id)}
    inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if examples.token_type_ids is not None:
        inputs["token_type_ids"] = pad_sequence([examples.token_type_ids[i] for i in indices], batch_first=True)
    targets = torch.tensor([] if examples.targets is None else [examples.targets[index] for index in indices])
    return Batch(
        {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()},
        targets.to(device, non_blocking=True),
    )
