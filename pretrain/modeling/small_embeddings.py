"""Gradients of small embedding tables on a GPU, such as the one for BERT's two token types.

CUDA's kernel adds the gradients of equal indices ten at a time, and then adds these sums one after another in a single
thread per column (aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu, torch 2.13): 6,554 additions for 65,536 slots,
which all have token type 0. A matrix product with one-hot ids reads the gradient once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.models.fp32_sums import Embedding

_MOST_ROWS = 4


def use_one_hot_products(model: nn.Module) -> None:
    """Let a GPU compute the gradients of the model's small tables as matrix products. Parameters and their names do not
    change; results differ by rounding."""
    for module in model.modules():
        if type(module) is nn.Embedding and _is_plain(module):
            module.__class__ = SmallEmbedding


def _is_plain(table: nn.Embedding) -> bool:
    special = table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse
    return table.num_embeddings <= _MOST_ROWS and not special


class SmallEmbedding(Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        if not self.weight.is_cuda:
            return super().forward(ids)
        rows: Tensor = OneHotEmbedding.apply(ids, self.weight)  # type: ignore[no-untyped-call]
        return rows


class OneHotEmbedding(torch.autograd.Function):
    """`F.embedding`, whose gradient is a product of the one-hot ids and the gradient of the result."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table_rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        one_hot = ids.reshape(-1) == torch.arange(ctx.table_rows, device=ids.device)[:, None]
        return None, one_hot.to(gradient.dtype) @ gradient.reshape(ids.numel(), -1)
