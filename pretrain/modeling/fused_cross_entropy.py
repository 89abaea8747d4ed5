"""Cross-entropy of a linear layer, without its logits [M, V]: a Triton kernel between matrix products.

Method: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3. A chunk of rows at a time, the logits are
computed, reduced to losses and overwritten with their gradients, of which two more products make the gradients of the
inputs. All this happens in the forward pass, so the logits are computed once and never kept; the backward pass scales
the gradients. Unlike there, the gradients of the inputs are accumulated in fp32, and gradients of fp16 logits are
scaled before they are rounded, because a probability of one in 50,000 is among fp16's subnormal numbers. A vocabulary
such as BERT's 30,522 is padded with zeros: for products of that width cuBLAS uses code for older devices, and the
kernel would read one logit at a time.

Importing this module imports Triton. Its interpreter (`TRITON_INTERPRET=1`) runs the kernel on a CPU.

Shapes: M rows, D hidden, V vocabulary, P the vocabulary with padding, C rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.batching.batch import IGNORED
from pretrain.modeling.logit_chunks import CHUNK_LOGITS, chunk_rows, pad_vocabulary

_BLOCK = 4096  # logits that a program of the kernel holds at once: more leave room for one program per multiprocessor
_FP16_SCALE = 4096.0


class CrossEntropy(NamedTuple):
    loss_sum: Tensor  # scalar, fp32: over the rows whose label is not IGNORED, in nats
    correct: Tensor | None  # scalar, int64: how many of them have their largest logit at the label; None with gradients


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> CrossEntropy:
    """Return the cross-entropy of `hidden @ weight.T + bias`. Differentiable with respect to these three.

    Args:
        hidden: [M, D], in fp16, bf16 or fp32, as `weight` [V, D] and `bias` [V].
        labels: int64 [M]; rows labelled IGNORED do not count.
        chunk_logits: logits that are computed at once, about.
    """
    padded = pad_vocabulary(weight), None if bias is None else pad_vocabulary(bias)
    loss_sum, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *padded, labels, len(weight), chunk_logits, torch.is_grad_enabled()
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
        chunk_logits: int,
        needed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`weight` [P, D] and `bias` [P]: the last P - V rows are zeros. columns: V."""
        wanted = [needed and wants for wants in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if wants and tensor is not None else None
            for tensor, wants in zip((hidden, weight, bias), wanted, strict=True)
        ]
        rows = len(hidden)
        losses = hidden.new_empty(rows, dtype=torch.float32)
        correct = None if any(wanted) else hidden.new_empty(rows, dtype=torch.int32)
        height = chunk_rows(columns, chunk_logits)
        buffer = hidden.new_empty(min(height, rows), len(weight))
        for start in range(0, rows, height):
            chunk = slice(start, start + height)
            logits = buffer[: len(labels[chunk])]
            torch.mm(hidden[chunk], weight.t(), out=logits)  # 0 in the last columns, and so are their gradients
            counted = None if correct is None else correct[chunk]
            _reduce(logits, columns, bias, labels[chunk], losses[chunk], counted)
            _accumulate(gradients, chunk, logits, hidden[chunk], weight)
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.scale = hidden.dtype, _scale(hidden.dtype)
        return losses.sum(), None if correct is None else correct.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        factor = upstream / ctx.scale
        scaled = [
            None if total is None else torch.mul(total, factor, out=torch.empty_like(total, dtype=ctx.dtype))
            for total in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None)


def _scale(dtype: torch.dtype) -> float:
    """Return the scale of the gradients of logits, which are between -1 and 1."""
    return _FP16_SCALE if dtype == torch.float16 else 1.0


def _reduce(
    logits: Tensor, columns: int, bias: Tensor | None, labels: Tensor, losses: Tensor, correct: Tensor | None
) -> None:
    """Fill `losses` and `correct`, both [C]. If `correct` is None, overwrite `logits` [C, P] with their scaled
    gradients. columns: V."""
    rows, width = logits.shape
    _cross_entropy_kernel[(rows,)](
        logits,
        width,
        columns,
        bias,
        labels,
        losses,
        correct,
        _scale(logits.dtype),
        IGNORED=IGNORED,
        HAS_BIAS=bias is not None,
        WANTS_GRADIENT=correct is None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        num_warps=8,
    )


def _accumulate(
    gradients: list[Tensor | None], chunk: slice, logits_gradient: Tensor, hidden: Tensor, weight: Tensor
) -> None:
    """Add the contribution of a chunk, [C, P], to the fp32 gradients of hidden [M, D], weight [P, D] and bias [P]."""
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        _add_product(of_hidden[chunk], logits_gradient, weight)
    if of_weight is not None:
        _add_product(of_weight, logits_gradient.t(), hidden)
    if of_bias is not None:
        of_bias += logits_gradient.sum(0, dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@triton.jit  # type: ignore[untyped-decorator]
def _load_logits(logits, bias, column, width, columns, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load logits in fp32; padding is -inf. `width` is a multiple of 16, so that several logits are loaded at once."""
    values = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(column < columns, values, -float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits,
    width,
    columns,
    bias,
    labels,
    losses,
    correct,
    scale,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row, of `width` logits, the last of which are padding. If wanted, they become their gradients
    times `scale`; else `correct` is filled."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    counts = label != IGNORED
    label = tl.where(counts, label, 0)
    at_label = tl.load(logits + label).to(tl.float32)
    if HAS_BIAS:
        at_label += tl.load(bias + label).to(tl.float32)

    largest = -float("inf")
    largest_at = tl.zeros((), dtype=tl.int32)
    total = 0.0  # of exp(logit - largest)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = _load_logits(logits, bias, column, width, columns, HAS_BIAS)
        highest = tl.max(values, axis=0)
        if not WANTS_GRADIENT:
            largest_at = tl.where(highest > largest, start + tl.argmax(values, axis=0), largest_at)
        before, largest = largest, tl.maximum(largest, highest)
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(values - largest), axis=0)
    tl.store(losses + row, tl.where(counts, tl.log(total) + (largest - at_label), 0.0))

    if not WANTS_GRADIENT:
        tl.store(correct + row, (counts & (largest_at == label)).to(tl.int32))
    else:
        factor = scale / total
        tl.debug_barrier()  # all threads have read the logits
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = _load_logits(logits, bias, column, width, columns, HAS_BIAS)
            gradient = tl.exp(values - largest) * factor - tl.where(column == label, scale, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)
