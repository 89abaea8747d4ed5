"""Texts to the token ids that a model expects."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """One sequence."""

    input_ids: Tensor  # T int64
    token_type_ids: Tensor | None  # T int64; None if the model has none
    truncated: bool = False
    full_length: int | None = None  # tokens before it was cut, if it was

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Encoder:
    """Encodes texts for one model."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens of a sequence, special tokens included
    token_types: bool  # whether the model has token types
    special_tokens_in_text: bool = False  # whether those written out in a text are special; otherwise they are text

    def encode(self, text: str, text_pair: str | None = None) -> Tokens:
        """A text or a pair as one sequence. If it is too long, the longer text is cut at its end."""
        encoded = self._tokenize(text, text_pair, truncation="longest_first", max_length=self.max_length)
        ids = encoded["input_ids"]
        # Tokenize a sequence of maximum length again, to see whether it was cut.
        full_length = len(self._tokenize(text, text_pair)["input_ids"]) if len(ids) == self.max_length else len(ids)
        types = torch.tensor(encoded["token_type_ids"]) if self.token_types else None
        return Tokens(torch.tensor(ids), types, full_length > len(ids), full_length)

    def _tokenize(self, text: str, text_pair: str | None, **options: Any) -> Any:
        return self.tokenizer(
            text,
            text_pair,
            add_special_tokens=True,
            split_special_tokens=not self.special_tokens_in_text,
            return_attention_mask=False,
            return_token_type_ids=self.token_types,
            verbose=False,
            **options,
        )
