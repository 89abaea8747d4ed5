"""GELU after a layer with a bias: a Triton kernel for the backward pass.

The kernel writes the gradient of the layer's output and sums it over rows, which is the gradient of the bias. Inductor
would read the largest tensor of an encoder layer once more. For the formula, see `pretrain.modeling.fast_gelu`.

Importing this module imports Triton. Its interpreter (`TRITON_INTERPRET=1`) runs the kernel on a CPU.

Shapes: R rows, N columns.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from pretrain.modeling.fast_gelu import POLYNOMIAL, SLOPE, gelu_in_fp32

_ROWS, _COLUMNS, _STEPS = 16, 128, 32  # a program computes _ROWS rows at once, _STEPS times
_SLOPE = tl.constexpr(SLOPE * 0.5**0.5)
_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH = (tl.constexpr(0.5 * coefficient) for coefficient in POLYNOMIAL)
_EXPONENT = tl.constexpr(-0.5 * math.log2(math.e))
_DENSITY = tl.constexpr((2 * math.pi) ** -0.5)


def bias_gelu(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU of `F.linear(inputs, weight, bias)`, in 16 bit."""
    result: Tensor = _BiasGelu.apply(F.linear(inputs, weight, bias.detach()), bias)  # type: ignore[no-untyped-call]
    return result


class _BiasGelu(torch.autograd.Function):
    """`values` include the bias, which is an argument because it gets a gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return gelu_in_fp32(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (values,) = ctx.saved_tensors
        columns = values.shape[-1]
        grad_values, sums = _backward(gradient.reshape(-1, columns).contiguous(), values.reshape(-1, columns))
        return grad_values.view(values.shape), sums.sum(0).to(gradient.dtype)


@custom_op("deepcloze::bias_gelu_backward", mutates_args=())
def _backward(gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of `values` [R, N], and its sums over parts of the rows, fp32 [parts, N]."""
    assert gradient.is_contiguous()
    assert values.is_contiguous()
    grad_values, sums = _allocate(gradient, values)
    rows, columns = values.shape
    grid = (triton.cdiv(columns, _COLUMNS), len(sums))
    _backward_kernel[grid](gradient, values, grad_values, sums, rows, columns, _ROWS, _COLUMNS, _STEPS)
    return grad_values, sums


@_backward.register_fake
def _allocate(gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape
    parts = -(-rows // (_ROWS * _STEPS))
    return torch.empty_like(values), values.new_empty(parts, columns, dtype=torch.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient, values, grad_values, sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr
):
    """One program per block of columns and part of the rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS * STEPS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        places = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        upstream = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(value)
        bell = tl.exp2(size * size * _EXPONENT)
        inverse = 1.0 / (1.0 + _SLOPE * size)
        tail = ((((_FIRST * inverse + _SECOND) * inverse + _THIRD) * inverse + _FOURTH) * inverse + _FIFTH) * inverse
        slope_below_zero = tail * bell - size * (bell * _DENSITY)
        product = upstream * tl.where(value < 0, slope_below_zero, 1.0 - slope_below_zero)
        tl.store(grad_values + places, product.to(grad_values.dtype.element_ty), mask=inside)
        total += product
    tl.store(sums + tl.program_id(1) * columns + column, tl.sum(total, axis=0), mask=column < columns)
