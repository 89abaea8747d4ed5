"""Examples, the splits that they come from, and padded batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.data.records import Table
from finetune.encoding.encoder import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Shape suffixes: S sequences of a batch, T tokens of the longest of them.


@dataclass(frozen=True)
class Example:
    """A unit that training draws: usually one sequence, or several that share a loss."""

    sequences: tuple[Tokens, ...]
    target: Any = None  # None if the split has no targets
    details: Any = None  # whatever its kind needs to compute outputs and to decode them

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class Padding:
    """The padding of sequences to the same length."""

    token_id: int
    side: str  # "left" or "right"
    token_type_id: int
    length: int | None = None  # of all batches; None: of the longest sequence of each batch
    is_avoided: bool = False  # whether examples share a batch only if their longest sequences are equally long

    def pad(self, rows: Sequence[Tensor], value: float) -> Tensor:
        """Stack rows of one value per token to a tensor ST."""
        padded = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=self.side)
        missing = 0 if self.length is None else self.length - padded.shape[1]
        return F.pad(padded, (missing, 0) if self.side == "left" else (0, missing), value=value)

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Padding":
        return cls(tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.pad_token_type_id)


@dataclass(frozen=True)
class Batch:
    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]  # arguments of the model's forward, ST each
    targets: Tensor | None  # see `TaskKind.targets`; None if the split has none


def pad_sequences(sequences: Sequence[Tokens], padding: Padding, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of a model's forward, ST each."""
    inputs = {
        "input_ids": padding.pad([tokens.input_ids for tokens in sequences], padding.token_id),
        "attention_mask": padding.pad([torch.ones_like(tokens.input_ids) for tokens in sequences], 0),
    }
    types = [tokens.token_type_ids for tokens in sequences if tokens.token_type_ids is not None]
    if types:
        inputs["token_type_ids"] = padding.pad(types, padding.token_type_id)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def padding_last(outputs: Tensor, batch: Batch) -> Tensor:
    """Return outputs for each token (ST…), with the padding of each sequence moved behind its tokens."""
    order = torch.argsort(batch.inputs["attention_mask"], dim=1, descending=True, stable=True)
    return outputs[torch.arange(len(order), device=order.device)[:, None], order]


@dataclass(frozen=True)
class Split:
    """The records of a split and their examples, in order."""

    table: Table
    examples_of: tuple[tuple[Example, ...], ...]  # of each record

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        return tuple(chain.from_iterable(self.examples_of))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each example."""
        return [example.longest for example in self.examples]

    def count_cut(self) -> int:
        """Count the records of which tokens were left out."""
        return sum(any(tokens.cut for each in examples for tokens in each.sequences) for examples in self.examples_of)
