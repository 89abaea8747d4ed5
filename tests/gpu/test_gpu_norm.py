"""Norms beside residual connections, in compiled code on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import Tensor, nn

from pretrain.modeling.fused_norm import dropout_add_norm, norm_beside_residual

ROWS = 5_000


@compiled
def after_residual(values: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, ...]:
    return dropout_add_norm(values + bias.detach(), bias, 0.0, residual, norm, twice=True)


@compiled
def after_dropout(
    values: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm, twice: bool
) -> tuple[Tensor, ...]:
    return dropout_add_norm(values, bias, 0.25, residual, norm, twice)


@compiled
def before_residual(values: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm_beside_residual(values, norm)


def compare(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("columns", [768, 1024, 2048, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_beside_residual_connections(dtype: torch.dtype, columns: int) -> None:
    """Catches a kernel that does not compile, or that computes something else than in the interpreter."""
    draw = torch.Generator("cuda").manual_seed(0)
    norm = nn.LayerNorm(columns, device="cuda").to(dtype)
    shapes = ((1, ROWS, columns), (columns,), (1, ROWS, columns))
    leaves = [torch.randn(shape, generator=draw, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    upstreams = [torch.randn(1, ROWS, columns, generator=draw, device="cuda").to(dtype) for _ in range(2)]
    exact = [leaf.detach().double().requires_grad_() for leaf in (*leaves, *norm.parameters())]
    wide = [upstream.double() for upstream in upstreams]
    values, bias, residual, *weights = exact

    found = after_residual(*leaves, norm)
    expected = (F.layer_norm(values + bias + residual, (columns,), *weights),) * 2
    of_found = torch.autograd.grad(found, [*leaves, *norm.parameters()], upstreams)
    compare((*expected, *torch.autograd.grad(expected, exact, wide)), (*found, *of_found))

    for has_bias in (True, False):
        if not has_bias:
            norm, weights = nn.LayerNorm(columns, device="cuda", bias=False).to(dtype), weights[:1]
        outputs = before_residual(leaves[0], norm)
        expected = F.layer_norm(values, (columns,), *weights), values.view_as(values)
        of_outputs = torch.autograd.grad(outputs, [leaves[0], *norm.parameters()], upstreams)
        compare((*expected, *torch.autograd.grad(expected, [values, *weights], wide)), (*outputs, *of_outputs))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dropout_before_a_norm_is_repeated(dtype: torch.dtype, twice: bool) -> None:
    """Catches another mask in the backward pass than in the forward pass."""
    norm = nn.LayerNorm(768, device="cuda").to(dtype)
    residual = torch.zeros(1, ROWS, 768, device="cuda", dtype=dtype)
    values, bias = (torch.ones(*shape, 768, device="cuda", dtype=dtype).requires_grad_() for shape in ((1, ROWS), ()))
    outputs = after_dropout(values, bias, residual, norm, twice)
    output = outputs[0]
    of_values, of_bias = torch.autograd.grad(outputs, [values, bias], [torch.randn_like(output) for _ in outputs])
    kept = output > 0  # values that are kept are larger than the mean of their row
    assert 0.74 < float(kept.float().mean()) < 0.76
    assert (of_values[~kept] == 0).all()
    assert float((of_values[kept] != 0).float().mean()) > 0.999
    compare((of_values.double().sum((0, 1)),), (of_bias,))
