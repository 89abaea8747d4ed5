"""GELU in compiled code on a GPU.

CUDA's error function takes longer than reading and writing the tensor. In 16 bit, fewer digits are enough: here it is a
polynomial times an exponential that the derivative needs, too.

Method: Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", formula 7.1.26. Its absolute error is below
1.5e-7.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

# Coefficients of t = 1 / (1 + SLOPE x / sqrt(2)), highest power first
POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
SLOPE = 0.3275911


def use_fast_gelu(model: nn.Module) -> None:
    """Let the model's GELU activations call `fast_gelu`."""
    for module in model.modules():
        if type(module) is GELUActivation:
            module.act = fast_gelu  # type: ignore[assignment]


def fast_gelu(values: Tensor) -> Tensor:
    """Compute GELU in any shape. Outside of compiled code, on a CPU and in fp32 torch's own."""
    if not is_compiled_in_16_bit(values):
        return F.gelu(values)
    result: Tensor = Gelu.apply(values)  # type: ignore[no-untyped-call]
    return result


def is_compiled_in_16_bit(values: Tensor) -> bool:
    return values.is_cuda and values.element_size() == 2 and torch.compiler.is_compiling()


class Gelu(torch.autograd.Function):
    """Computes in fp32. Both directions are written so that Inductor fuses all of the backward pass of a gated layer,
    GELU(a) * b of halves of a product, into one kernel."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return gelu_in_fp32(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        wide = values.float()
        size = wide.abs()
        tail, density = _normal_distribution(size)
        slope_below_zero = tail - size * density
        product: Tensor = gradient.float() * torch.where(wide < 0, slope_below_zero, 1.0 - slope_below_zero)
        return product.to(gradient.dtype)


def gelu_in_fp32(values: Tensor) -> Tensor:
    """Compute GELU in fp32; returns the dtype of `values`. Its derivative is not computed by autograd."""
    wide = values.float()
    size = wide.abs()
    tail, _ = _normal_distribution(size)
    return (wide.relu() - size * tail).to(values.dtype)


def _normal_distribution(size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of standard normal values that are larger than `size`, which is not negative, and the
    density."""
    bell = torch.exp2(size * size * (-0.5 * math.log2(math.e)))
    inverse = 1.0 / (1.0 + SLOPE * 0.5**0.5 * size)
    first, *others = POLYNOMIAL
    tail = 0.5 * first * inverse
    for coefficient in others:
        tail = (tail + 0.5 * coefficient) * inverse
    return tail * bell, bell * (2 * math.pi) ** -0.5
