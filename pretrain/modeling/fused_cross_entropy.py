"""Cross-entropy of a linear layer, without its logits [M, V]: a Triton kernel between matrix products.

Method: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3. A chunk of rows at a time, the logits are
computed, reduced to losses and overwritten with their gradients, of which two more products make the gradients of the
inputs. All this happens in the forward pass, so the logits are computed once and never kept; the backward pass scales
the gradients. Unlike there, the gradients of the inputs are accumulated in fp32, and gradients of fp16 logits are
scaled before they are rounded, because a probability of one in 50,000 is among fp16's subnormal numbers. A vocabulary
such as BERT's 30,522 is padded with zeros: for products of that width cuBLAS uses code for older devices, and the
kernel would read one logit at a time.

On the meta device tensors are allocated as on a GPU, without Triton: `deepcloze plan` counts them.

Shapes: M rows, D hidden, V vocabulary, P the vocabulary with padding, C rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_LOGITS = 2**28  # computed at once, about: 512 MiB in 16 bit; the products of fewer rows are slower
_ROW_TILE = 128  # a chunk has a multiple of this number of rows, and matrix products have whole tiles
_ALIGNMENT = 64  # columns of logits are padded to a multiple: matrix products of other widths are slow
_FP16_SCALE = 4096.0


def chunk_rows(vocabulary: int) -> int:
    """Return C, how many rows are computed at once."""
    return max(1, _CHUNK_LOGITS // vocabulary // _ROW_TILE) * _ROW_TILE


def padded_columns(vocabulary: int) -> int:
    """Return how many columns of the logits are computed."""
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT


def _pad_vocabulary(parameter: Tensor) -> Tensor:
    """Return a decoder's weight [V, D] or bias [V] with zeros for the columns that are added. Differentiable."""
    padding = padded_columns(len(parameter)) - len(parameter)
    return F.pad(parameter, (0, 0) * (parameter.ndim - 1) + (0, padding)) if padding else parameter


class CrossEntropy(NamedTuple):
    loss_sum: Tensor  # scalar, fp32: over the rows whose label is not IGNORED, in nats
    correct: Tensor | None  # scalar, int64: how many of them have their largest logit at the label; None with gradients


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> CrossEntropy:
    """Return the cross-entropy of `hidden @ weight.T + bias`. Differentiable with respect to these three.

    Args:
        hidden: [M, D], in fp16, bf16 or fp32, as `weight` [V, D] and `bias` [V].
        labels: int64 [M]; rows labelled IGNORED do not count.
    """
    padded = _pad_vocabulary(weight), None if bias is None else _pad_vocabulary(bias)
    loss_sum, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *padded, labels, len(weight), torch.is_grad_enabled()
    )
    return CrossEntropy(loss_sum, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        columns: int,
        needed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`weight` [P, D] and `bias` [P]: the last P - V rows are zeros. columns: V."""
        ctx.dtype = hidden.dtype
        ctx.scale = _FP16_SCALE if hidden.dtype == torch.float16 else 1.0  # of the logits' gradients, in [-1, 1]
        wanted = [needed and wants for wants in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if wants and tensor is not None else None
            for tensor, wants in zip((hidden, weight, bias), wanted, strict=True)
        ]
        rows = len(hidden)
        losses = hidden.new_empty(rows, dtype=torch.float32)
        correct = None if any(wanted) else hidden.new_empty(rows, dtype=torch.int32)
        height = chunk_rows(columns)
        buffer = hidden.new_empty(min(height, rows), len(weight))
        for start in range(0, rows, height):
            chunk = slice(start, start + height)
            logits = buffer[: len(hidden[chunk])]
            torch.mm(hidden[chunk], weight.t(), out=logits)  # 0 in the last columns, and so are their gradients
            if logits.is_meta:
                continue
            from pretrain.modeling.cross_entropy_kernel import reduce_logits

            counted = None if correct is None else correct[chunk]
            reduce_logits(logits, columns, bias, labels[chunk], losses[chunk], counted, ctx.scale)
            _accumulate(gradients, chunk, logits, hidden[chunk], weight)
        ctx.save_for_backward(*gradients)
        return losses.sum(), None if correct is None else correct.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        factor = upstream / ctx.scale
        scaled = [
            None if total is None else torch.mul(total, factor, out=torch.empty_like(total, dtype=ctx.dtype))
            for total in ctx.saved_tensors
        ]
        return (*scaled, None, None, None)


def _accumulate(
    gradients: list[Tensor | None], chunk: slice, logits_gradient: Tensor, hidden: Tensor, weight: Tensor
) -> None:
    """Add the contribution of a chunk, [C, P], to the fp32 gradients of hidden [M, D], weight [P, D] and bias [P]."""
    grad_hidden, grad_weight, grad_bias = gradients
    if grad_hidden is not None:
        _add_product(grad_hidden[chunk], logits_gradient, weight)
    if grad_weight is not None:
        _add_product(grad_weight, logits_gradient.t(), hidden)
    if grad_bias is not None:
        grad_bias += logits_gradient.sum(0, dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
