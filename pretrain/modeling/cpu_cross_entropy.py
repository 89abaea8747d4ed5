"""Cross-entropy of a linear layer on a CPU: its logits [M, V] exist once, and become their own gradients.

In the forward pass a few rows at a time, which stay in the CPU's cache, are reduced to their losses, overwritten with
the gradients, softmax minus one at the label, and added to the gradient of the bias. torch's `cross_entropy` writes
four more tensors of that size to memory. The idea is from Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3.

Shapes: M rows, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from experiment.models.fast_linear import input_gradient, multiply, uses_openblas, weight_gradient
from pretrain.batching.batch import IGNORED

_CHUNK_LOGITS = 2**19  # 2 MiB in fp32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T + bias` in nats, summed over the rows whose label is not IGNORED:
    a scalar in fp32. Differentiable with respect to `hidden`, `weight` and `bias`, once.

    Args:
        hidden: [M, D], in bf16 or fp32, as `weight` [V, D] and `bias` [V].
        labels: int64 [M].
    """
    loss_sum: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels)  # type: ignore[no-untyped-call]
    return loss_sum


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        apart = uses_openblas(hidden.dtype)  # OpenBLAS adds no bias
        logits = multiply(hidden, weight, None if apart else bias)
        bias_gradient = torch.zeros(weight.shape[0], dtype=torch.float32) if ctx.needs_input_grad[2] else None
        losses = _to_gradients(logits, labels[:, None], bias if apart else None, bias_gradient)
        ctx.save_for_backward(hidden, weight, logits, bias_gradient)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, gradient, bias_gradient = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        return (
            input_gradient(gradient, weight).mul_(scale) if needs_hidden else None,
            _weight_gradient(gradient, hidden * scale) if needs_weight else None,
            None if bias_gradient is None else (bias_gradient * scale).to(gradient.dtype),
            None,
        )


def _weight_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    # In fp32 oneDNN copies a transposed left operand: [V, M] here. Below, [D, M] and the result, [V, D].
    if gradient.dtype != torch.float32 or uses_openblas(gradient.dtype) or gradient.shape[0] <= hidden.shape[1]:
        return weight_gradient(gradient, hidden)
    return multiply(hidden.t(), gradient.t()).t().contiguous()


def _to_gradients(logits: Tensor, labels: Tensor, bias: Tensor | None, bias_gradient: Tensor | None) -> Tensor:
    """Return the losses, fp32 [M, 1], whose gradients take the place of the logits.

    labels: [M, 1]. bias: [V], added to the logits. bias_gradient: fp32 [V], to which the gradients are added.
    """
    losses = torch.empty_like(labels, dtype=torch.float32)
    rows = max(1, _CHUNK_LOGITS // logits.shape[1])
    for chunk, label, loss in zip(*(torch.split(tensor, rows) for tensor in (logits, labels, losses)), strict=True):
        counted = label != IGNORED
        target = torch.where(counted, label, 0)
        values = chunk.float()  # the chunk itself in fp32
        if bias is not None:
            values.add_(bias)
        largest, logit = values.amax(1, keepdim=True), values.gather(1, target)
        torch.softmax(values, 1, out=values)
        # The largest probability gives the logarithm of the sum of exponentials; the label's may be rounded to 0.
        log_sum = largest - values.amax(1, keepdim=True).log_()
        loss.copy_(torch.where(counted, log_sum - logit, 0.0))
        values.scatter_add_(1, target, values.new_full(target.shape, -1.0)).mul_(counted)
        if bias_gradient is not None:
            bias_gradient.add_(values.sum(0))
        chunk.copy_(values)
    return losses
