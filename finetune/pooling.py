"""One vector for a text from the hidden states of its tokens."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "cls"]
"""The mean over all tokens, special ones included; or the first token, such as [CLS]."""


def pool(hidden_STD: Tensor, mask_ST: Tensor, pooling: Pooling) -> Tensor:
    """Return the vectors SD of S texts, in fp32. mask_ST: 0 for padding, which may be on either side."""
    if pooling == "cls":
        return hidden_STD[torch.arange(len(mask_ST), device=mask_ST.device), mask_ST.argmax(dim=1)].float()
    mask_ST1 = mask_ST.unsqueeze(-1).float()
    return (hidden_STD.float() * mask_ST1).sum(dim=1) / mask_ST1.sum(dim=1)
