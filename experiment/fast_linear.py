"""Linear layers on a CPU, computed by oneDNN.

In fp32 torch uses MKL, which has slower code for CPUs that are not Intel's: on an AMD EPYC with AVX-512, oneDNN is
twice as fast. In bf16 torch uses oneDNN, but writes the bias to the output first, which oneDNN then reads and adds to:
with a vocabulary as output that takes a quarter of the time. Results differ by rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AVAILABLE = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_BF16 = _AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_DTYPES = (torch.float32, torch.bfloat16) if _BF16 else (torch.float32,)


def use_fast_linear(model: nn.Module) -> None:
    """Let oneDNN compute the model's linear layers on a CPU. Parameters and their names do not change."""
    if _AVAILABLE:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear


class FastLinear(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        if values.device.type != "cpu" or values.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return F.linear(values, self.weight, self.bias)
        if values.dtype not in _DTYPES or values.dtype != self.weight.dtype:
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
        multiply = _multiply if gradient.dtype == torch.float32 else F.linear  # without bias, both use oneDNN in bf16
        wanted = ctx.needs_input_grad
        return (
            multiply(gradient, weight.t()) if wanted[0] else None,
            multiply(gradient.t(), rows.t()) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias"""
    multiply = _compiled_multiply if torch.compiler.is_compiling() else _onednn_multiply
    product: Tensor = multiply(rows, weight, bias)
    return product


def _onednn_multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


# torch.compile accepts oneDNN's operator only with constant weights. Calling this one takes 40 µs more.
@torch.library.custom_op("deepcloze::multiply", mutates_args=())
def _compiled_multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn_multiply(rows, weight, bias)


@_compiled_multiply.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])
