"""Layer norms and embeddings in 16 bit on a CPU whose parameters' gradients are summed in fp32.

torch sums these gradients over tokens in the dtype of the values, and rounds after each addition: with 8,192 tokens in
bf16 the relative error is 10 to 25 % for a norm or a token type. It sums gradients of linear layers in fp32, and all
gradients in compiled code and on a GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 17  # elements of a tensor that are in fp32 at a time: they stay in the cache


def use_fp32_sums(model: nn.Module) -> None:
    """Let the model's layer norms and embeddings sum their gradients in fp32 on a CPU. Parameters and their names do
    not change."""
    if torch.cuda.is_available():
        return
    for module in model.modules():
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            module.__class__ = _LayerNorm
        elif type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
            module.__class__ = Embedding


def _is_summed_here(values: Tensor, parameter: Tensor | None) -> bool:
    """values: whose gradient is summed over tokens to the gradient of `parameter`."""
    is_trained = parameter is not None and parameter.requires_grad and torch.is_grad_enabled()
    in_16_bit = values.is_cpu and values.dtype in (torch.bfloat16, torch.float16)
    return is_trained and in_16_bit and not torch.compiler.is_compiling()


class _LayerNorm(nn.LayerNorm):
    def forward(self, values: Tensor) -> Tensor:
        if not _is_summed_here(values, self.weight):
            return super().forward(values)
        output: Tensor = _Norm.apply(values, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return output


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        ctx.has_bias = bias is not None
        # Mean and scale have the dtype of the weight, the output that of the values.
        in_fp32 = weight.float(), None if bias is None else bias.float()
        output, mean, scale = torch.native_layer_norm(values, weight.shape, *in_fp32, epsilon)
        ctx.save_for_backward(values, weight, mean, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, scale = ctx.saved_tensors
        grad_values = values.new_empty(values.shape)
        columns = weight.numel()
        in_fp32 = weight.float()
        sums = torch.zeros(2, columns)
        tensors = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gradient, values, mean, scale, grad_values))
        chunks = (tensor.split(max(1, _CHUNK // columns)) for tensor in tensors)
        for upstream, value, *statistics, grad_value in zip(*chunks, strict=True):
            grad_chunk, *grad_parameters = torch.ops.aten.native_layer_norm_backward(
                upstream.float(), value.float(), weight.shape, *statistics, in_fp32, in_fp32, [True] * 3
            )
            grad_value.copy_(grad_chunk)
            sums += torch.stack(grad_parameters)
        grad_weight, grad_bias = sums.to(weight.dtype)
        return grad_values, grad_weight, grad_bias if ctx.has_bias else None, None


class Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        if not _is_summed_here(self.weight, self.weight):
            return super().forward(ids)
        rows: Tensor = _Lookup.apply(ids, self.weight, self.padding_idx)  # type: ignore[no-untyped-call]
        return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table_rows, ctx.padding = weight.shape[0], padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        used_ids, places = ids.unique(return_inverse=True)  # a whole table in fp32 takes longer, and more memory
        sums = torch.ops.aten.embedding_dense_backward(gradient.float(), places, len(used_ids), -1, False)
        grad_table = gradient.new_zeros(ctx.table_rows, gradient.shape[-1]).index_copy_(
            0, used_ids.long(), sums.to(gradient.dtype)
        )
        if ctx.padding is not None:
            grad_table[ctx.padding] = 0
        return None, grad_table, None
