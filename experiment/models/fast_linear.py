"""Linear layers on a CPU, computed by oneDNN or OpenBLAS.

In fp32 torch uses MKL, which has slower code for CPUs that are not Intel's: on an AMD EPYC with AVX-512, oneDNN is
twice as fast. Without AVX-512, NumPy's OpenBLAS is faster than both on the AMD EPYC that it was measured on. It has
threads of its own, which would compete with torch's, so only processes with one thread use it; with more, oneDNN and
MKL are equally fast, but for gradients of weights, whose operands are transposed, MKL is a third faster. In bf16 torch
uses oneDNN, but writes the bias to the output first, which oneDNN then reads and adds to: with a vocabulary as output
that takes a quarter of the time. Results differ by rounding.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiment.process.hardware import lacks_avx512

_AVAILABLE = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_BF16 = _AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ONEDNN_DTYPES = ((torch.float32,) if _AVAILABLE else ()) + ((torch.bfloat16,) if _BF16 else ())
"""Dtypes in which oneDNN computes on this CPU. For bf16 it needs AVX-512."""
_NO_AVX512 = lacks_avx512()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def uses_openblas(dtype: torch.dtype) -> bool:
    """Return whether OpenBLAS computes products of this dtype: fp32 without AVX-512, while torch has one thread."""
    possible = _AVAILABLE and _NO_AVX512 and dtype == torch.float32 and torch.get_num_threads() == 1
    return possible and _openblas_with_one_thread()


@cache
def _openblas_with_one_thread() -> bool:
    """Limit OpenBLAS to one thread from now on. Return False if it is not loaded: NumPy may have another library."""
    openblas = ThreadpoolController().select(internal_api="openblas")
    openblas.limit(limits=1)
    return bool(openblas)


def use_fast_linear(model: nn.Module) -> None:
    """Let oneDNN or OpenBLAS compute the model's linear layers on a CPU. Parameters and their names do not change."""
    if _AVAILABLE:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear


class FastLinear(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        if values.numel() == 0 or torch.is_autocast_enabled("cpu") or not _computes(values, self.weight):
            return F.linear(values, self.weight, self.bias)
        rows = values.reshape(-1, self.in_features)
        product: Tensor = _Linear.apply(rows, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product.view(*values.shape[:-1], self.out_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            input_gradient(gradient, weight) if wanted[0] else None,
            weight_gradient(gradient, rows) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, of [N, K], [M, K] and [M]. Not differentiable on a CPU."""
    if not _computes(rows, weight):
        return F.linear(rows, weight, bias)
    compute = _compiled_multiply if torch.compiler.is_compiling() else _multiply
    product: Tensor = compute(rows, weight, bias)
    return product


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the rows of `multiply`, [N, K]. `gradient`: of its result, [N, M]."""
    product = multiply if gradient.dtype == torch.float32 else F.linear  # without bias, both use oneDNN in bf16
    return product(gradient, weight.t())


def weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of the weight of `multiply`, [M, K]. `gradient`: of its result, [N, M]."""
    mkl = _NO_AVX512 and not uses_openblas(gradient.dtype)
    product = F.linear if mkl or gradient.dtype != torch.float32 else multiply
    return product(gradient.t(), rows.t())


def _computes(values: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN or OpenBLAS computes the product."""
    return values.device.type == "cpu" and values.dtype in ONEDNN_DTYPES and values.dtype == weight.dtype


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor
    if uses_openblas(rows.dtype):
        product = rows.new_empty(rows.shape[0], weight.shape[0])
        with np.errstate(all="ignore"):  # as torch does
            np.dot(rows.detach().numpy(), weight.detach().numpy().T, out=product.numpy())
        return product if bias is None else product.add_(bias)
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


# torch.compile accepts oneDNN's operator only with constant weights. Calling this one takes 40 µs more.
@torch.library.custom_op("deepcloze::multiply", mutates_args=())
def _compiled_multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(rows, weight, bias)


@_compiled_multiply.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])
