"""Layer norm with its residual connection: a Triton kernel for the backward pass.

The kernel reads each tensor once. It adds the gradient of the residual connection, applies the mask of the preceding
dropout, and sums the gradients of the norm's parameters and of the preceding layer's bias. Inductor generates two to
four kernels that read most of these tensors again.

Importing this module imports Triton. Its interpreter (`TRITON_INTERPRET=1`) runs the kernel on a CPU.

Shapes: R rows, N columns, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import custom_op

from experiment.models.dropout import drop, odd_numbers, smallest_kept

_PROGRAMS, _WARPS = 1024, 4
# The tensor that the second gradient, `other`, is the gradient of
_NOTHING, _OUTPUT, _INPUT = (tl.constexpr(value) for value in range(3))


def dropout_add_norm(
    values: Tensor, layer_bias: Tensor, dropout: float, residual: Tensor, norm: nn.LayerNorm, twice: bool
) -> tuple[Tensor, ...]:
    """Compute `norm(dropout(values) + residual)`, once or twice: gradients of both are added in the kernel.

    Args:
        values: a layer's output, [..., N] in 16 bit.
        layer_bias: [N], the bias of this layer. Its gradient is computed here: pass `bias.detach()` to the layer.
        dropout: a probability less than 1.
    """
    parameters = (layer_bias, norm.weight, norm.bias, norm.eps)
    result: tuple[Tensor, ...] = _DropoutAddNorm.apply(values, residual, *parameters, dropout, twice)  # type: ignore[no-untyped-call]
    return result


def norm_beside_residual(values: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `norm(values)`, and the values for the residual connection. values: [..., N] in 16 bit."""
    output, residual = _NormBesideResidual.apply(values, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    return output, residual


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        residual: Tensor,
        _layer_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        dropout: float,
        twice: bool,
    ) -> tuple[Tensor, ...]:
        numbers = odd_numbers(values) if dropout else None
        if numbers is not None:
            values = drop(values, numbers, dropout)
        added = values + residual
        output, mean, scale = torch.native_layer_norm(added, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(added, mean, scale, weight, numbers)
        ctx.dropout = dropout
        return (output, output.clone()) if twice else (output,)  # Inductor does not copy it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, other: Tensor | None = None) -> tuple[Tensor | None, ...]:
        *saved, numbers = ctx.saved_tensors
        belongs_to = _NOTHING if other is None else _OUTPUT
        grad_residual, grad_values, sums = _backward(gradient, other, belongs_to.value, *saved, numbers, ctx.dropout, 3)
        grad_weight, grad_bias, grad_layer_bias = sums.sum(0).to(gradient.dtype)
        if numbers is None:
            grad_values = grad_residual
        return grad_values, grad_residual, grad_layer_bias, grad_weight, grad_bias, None, None, None


class _NormBesideResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
        output, mean, scale = torch.native_layer_norm(values, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(values, mean, scale, weight)
        ctx.parts = 1 if bias is None else 2
        return output, values.clone()  # Inductor does not copy them

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, other: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_values, _, sums = _backward(gradient, other, _INPUT.value, *saved, None, 0.0, ctx.parts)
        grad_weight, *grad_bias = sums.sum(0).to(gradient.dtype)
        return grad_values, grad_weight, grad_bias[0] if grad_bias else None, None


@custom_op("deepcloze::norm_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    other: Tensor | None,
    belongs_to: int,
    inputs: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    numbers: Tensor | None,
    dropout: float,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of the norm's inputs; of the values before dropout, if there are `numbers`; and fp32
    [P, parts, N], whose sums over P are the gradients of weight, bias, and the bias of the layer before.

    mean, scale: of each row of the inputs, the scale is 1 / standard deviation.
    """
    gradient, inputs = gradient.contiguous(), inputs.contiguous()
    other = gradient if other is None else other.contiguous()
    columns = inputs.shape[-1]
    padded = triton.next_power_of_2(columns)
    grad_inputs, grad_values, sums = _allocate(inputs, numbers, parts)
    _backward_kernel[len(sums),](
        gradient,
        other,
        inputs,
        mean,
        scale,
        weight,
        grad_inputs if numbers is None else numbers,
        grad_inputs,
        grad_values,
        sums,
        inputs.numel() // columns,
        columns,
        smallest_kept(dropout),
        1 / (1 - dropout),
        OTHER_OF=belongs_to,
        DROPS=numbers is not None,
        PARTS=parts,
        ROWS=rows_at_once(padded, parts),
        COLUMNS=padded,
        num_warps=_WARPS,
    )
    return grad_inputs, grad_values, sums


def rows_at_once(columns: int, parts: int) -> int:
    """Return the number of rows that a program processes at once, such that they and the sums fit into registers. Tuned
    on an H200.

    columns: with padding, a power of 2; parts: as for `_backward`.
    """
    return max(1, (4096 if parts == 1 else 2048) // columns)


def _allocate(inputs: Tensor, numbers: Tensor | None, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    grad_values = inputs.new_empty(0) if numbers is None else torch.empty_like(inputs)
    sums = inputs.new_empty(_PROGRAMS, parts, inputs.shape[-1], dtype=torch.float32)
    return torch.empty_like(inputs), grad_values, sums


_backward.register_fake(
    lambda _gradient, _other, _belongs_to, inputs, _mean, _scale, _weight, numbers, _dropout, parts: _allocate(
        inputs, numbers, parts
    )
)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient,
    other,
    inputs,
    means,
    scales,
    weight,
    numbers,
    grad_inputs,
    grad_values,
    sums,
    rows,
    columns,
    smallest_kept,
    kept_scale,
    OTHER_OF: tl.constexpr,
    DROPS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program computes every P-th block of rows.

    smallest_kept: product of the numbers of a row and a column whose element dropout keeps; kept_scale: of its value.
    """
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        column_numbers = tl.load(numbers + column, mask=inside, other=0)
    grad_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_layer_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        exists = row < rows
        places = row[:, None].to(tl.int64) * columns + column[None, :]
        mask = exists[:, None] & inside[None, :]
        upstream = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(inputs + places, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=exists, other=0.0)
        normal = (value - tl.load(means + row, mask=exists, other=0.0)[:, None]) * scale[:, None]
        if OTHER_OF == _OUTPUT:
            upstream += tl.load(other + places, mask=mask, other=0.0).to(tl.float32)
        weighted = upstream * factor[None, :]
        mean = tl.sum(weighted, axis=1) / columns
        slope = tl.sum(weighted * normal, axis=1) / columns
        result = (weighted - mean[:, None] - normal * slope[:, None]) * scale[:, None]
        if OTHER_OF == _INPUT:
            result += tl.load(other + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_inputs + places, result.to(grad_inputs.dtype.element_ty), mask=mask)
        grad_weight += upstream * normal
        if PARTS > 1:
            grad_bias += upstream
        if DROPS:
            row_numbers = tl.load(numbers + columns + row, mask=exists, other=0)
            products = row_numbers[:, None] * column_numbers[None, :]
            result = tl.where(products >= smallest_kept, result * kept_scale, 0.0)
            tl.store(grad_values + places, result.to(grad_values.dtype.element_ty), mask=mask)
        if PARTS > 2:
            grad_layer_bias += result
    sums += tl.program_id(0) * PARTS * columns + column
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=inside)
    if PARTS > 1:
        tl.store(sums + columns, tl.sum(grad_bias, axis=0), mask=inside)
    if PARTS > 2:
        tl.store(sums + 2 * columns, tl.sum(grad_layer_bias, axis=0), mask=inside)
