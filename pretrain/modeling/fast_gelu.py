"""GELU in compiled code on a GPU.

The error function of CUDA takes longer than memory does to deliver its argument. In 16 bit it needs fewer digits: here
it is a polynomial times the exponential function that the derivative needs, too.

Method: Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", formula 7.1.26; its error is below 1.5e-7.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # of 1 / (1 + _SLOPE x / sqrt(2))
_SLOPE = 0.3275911


def use_fast_gelu(model: nn.Module) -> None:
    """Let the model's GELU activations call `fast_gelu`."""
    for module in model.modules():
        if type(module) is GELUActivation:
            module.act = fast_gelu  # type: ignore[assignment]


def fast_gelu(values: Tensor) -> Tensor:
    """GELU, of any shape. Outside of compiled code, on a CPU and in fp32 torch's own."""
    if not (values.is_cuda and values.element_size() == 2 and torch.compiler.is_compiling()):
        return F.gelu(values)
    result: Tensor = Gelu.apply(values)  # type: ignore[no-untyped-call]
    return result


class Gelu(torch.autograd.Function):
    """Computes in fp32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        wide = values.float()
        share, _ = _normal_distribution(wide)
        return (wide * share).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        wide = values.float()
        share, density = _normal_distribution(wide)
        product: Tensor = gradient.float() * (share + wide * density)
        return product.to(gradient.dtype)


def _normal_distribution(values: Tensor) -> tuple[Tensor, Tensor]:
    """The share of standard normal values that are smaller, and the density."""
    bell = torch.exp2(values * values * (-0.5 * math.log2(math.e)))
    inverse = 1.0 / (1.0 + (_SLOPE * 0.5**0.5) * values.abs())
    first, *others = _POLYNOMIAL
    tail = 0.5 * first * inverse
    for coefficient in others:
        tail = (tail + 0.5 * coefficient) * inverse
    tail = tail * bell
    return torch.where(values < 0, tail, 1.0 - tail), bell * (2 * math.pi) ** -0.5
