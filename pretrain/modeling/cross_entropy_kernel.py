"""The Triton kernel of `fused_cross_entropy`, which imports this module where it runs.

Triton's interpreter (`TRITON_INTERPRET=1`) runs it on a CPU.

Shapes: C rows, V vocabulary, P the vocabulary with padding.
"""

import triton
import triton.language as tl
from torch import Tensor

from pretrain.batching.batch import IGNORED

_BLOCK = 4096  # logits that a program of the kernel holds at once: more leave room for one program per multiprocessor


def reduce_logits(
    logits: Tensor,
    columns: int,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor | None,
    scale: float,
) -> None:
    """Fill `losses` and `correct`, both [C]. If `correct` is None, overwrite `logits` [C, P] with their gradients times
    `scale`. columns: V."""
    rows, width = logits.shape
    _cross_entropy_kernel[(rows,)](
        logits,
        width,
        columns,
        bias,
        labels,
        losses,
        correct,
        scale,
        IGNORED=IGNORED,
        HAS_BIAS=bias is not None,
        WANTS_GRADIENT=correct is None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        num_warps=8,
    )


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
