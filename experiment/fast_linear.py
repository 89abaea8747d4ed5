"""Linear layers on a CPU in fp32, computed by oneDNN.

torch uses MKL there, which has slower code for CPUs that are not Intel's: on an AMD EPYC with AVX-512, oneDNN is twice
as fast. It computes in fp32 too; results differ by rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_fast_linear(model: nn.Module) -> None:
    """Let oneDNN compute the model's linear layers in fp32 on a CPU. Parameters and their names do not change."""
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear


class FastLinear(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        fp32 = values.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if values.device.type != "cpu" or not fp32 or values.numel() == 0:
            return F.linear(values, self.weight, self.bias)
        rows = values.reshape(-1, self.in_features)
        product: Tensor = _OneDnnLinear.apply(rows, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product.view(*values.shape[:-1], self.out_features)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.t()) if wanted[0] else None,
            _multiply(gradient.t(), rows.t()) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias"""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
