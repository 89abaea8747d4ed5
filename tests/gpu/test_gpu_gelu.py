"""GELU in compiled code on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import Tensor

from pretrain.modeling.bias_gelu import bias_gelu
from pretrain.modeling.fast_gelu import fast_gelu


@compiled
def activated(values: Tensor) -> Tensor:
    return fast_gelu(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_gelu(dtype: torch.dtype) -> None:
    """Catches another function or derivative than torch's, and digits that are lost in 16 bit."""
    values = torch.linspace(-9, 9, 100_000, device="cuda").to(dtype).requires_grad_()
    upstream = torch.linspace(-1, 2, 100_000, device="cuda").to(dtype)
    exact = values.detach().double().requires_grad_()
    errors = []
    for function in (activated, F.gelu):
        output, expected = function(values), F.gelu(exact)
        (gradient,), (expected_gradient,) = (
            torch.autograd.grad(result, inputs, upstream.to(result.dtype))
            for result, inputs in ((output, values), (expected, exact))
        )
        pairs = ((output, expected), (gradient, expected_gradient))
        errors.append([float((one - other).detach().abs().max()) for one, other in pairs])
    ours, of_torch = errors
    assert all(error < 1.01 * other + 1e-6 for error, other in zip(ours, of_torch, strict=True)), errors


@compiled
def of_layer(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(inputs, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_a_layer_with_a_bias(dtype: torch.dtype) -> None:
    """Catches a kernel that does not compile, or that computes something else than in the interpreter."""
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 1500, 64), (300, 64), (300,))
    leaves = [torch.randn(shape, generator=draw, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(2, 1500, 300, generator=draw, device="cuda").to(dtype)
    found, expected = of_layer(*leaves), F.gelu(F.linear(*exact))
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    )
    assert all((one.double() - other).norm() < 1e-2 * other.norm() for one, other in pairs)
