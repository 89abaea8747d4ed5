"""Embed texts: one vector for each, from the encoder of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.encoding.examples import pad_sequences
from finetune.loaded_model import EncodedText, LoadedModel

Pooling = Literal["mean", "first"]


@dataclass(frozen=True)
class EmbeddedText(EncodedText):
    """A text to embed."""

    pooling: Pooling  # mean over all tokens, special ones included; or the first token, such as [CLS]


@dataclass(frozen=True)
class Embedder:
    """The encoder of a loaded model, without its head. Threads may share it."""

    loaded: LoadedModel

    def encode(self, texts: Sequence[str], pooling: Pooling) -> list[EmbeddedText]:
        """Texts that are too long are cut."""
        with self.loaded.encoding:
            return [EmbeddedText(self.loaded.encoder.encode(text), pooling) for text in texts]

    def compute(self, texts: Sequence[EmbeddedText]) -> list[list[float]]:
        """The vectors of texts, D numbers each: hidden states of the last layer, pooled."""
        inputs = pad_sequences([text.tokens for text in texts], self.loaded.padding, self.loaded.device.device)
        with torch.inference_mode(), self.loaded.device.autocast():
            hidden_STD = self.loaded.model.base_model(**inputs).last_hidden_state.float()
        mask_ST = inputs["attention_mask"]
        pooled = [_pool(*row) for row in zip(hidden_STD, mask_ST, (text.pooling for text in texts), strict=True)]
        vectors: list[list[float]] = torch.stack(pooled).tolist()
        return vectors


def _pool(hidden_TD: Tensor, mask_T: Tensor, pooling: Pooling) -> Tensor:
    tokens = hidden_TD[mask_T.bool()]
    return tokens[0] if pooling == "first" else tokens.mean(0)
