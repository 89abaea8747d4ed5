"""Flash attention over packed sequences, with dropout and local windows.

FlashAttention-2 computes blocks of 128 queries and keys, most of which is masked at the end of a short sequence and at
both ends of a local window. Here a block has 64 slots: with ModernBERT's window of 64 on each side, a block of queries
needs three of keys. Matrix products use Hopper's own instructions (wgmma), which FlashAttention-2 does not.

Method: Dao 2023, "FlashAttention-2", arXiv 2307.08691: scores are computed block by block and never stored. The
backward pass recomputes the weights from the scores and the saved logsumexp of each query.

The gradients of queries, keys and values are parts of one tensor, as the layer that computed all three needs them:
with respect to queries and keys before rotary positions (Su et al. 2021, arXiv 2104.09864), if there are any.

Importing this module imports Triton, for `pretrain.modeling.varlen_kernels`.

Shapes: T slots, S sequences, H heads, D dimensions of a head.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from experiment.process.hardware import HOPPER
from pretrain.modeling.varlen_kernels import LOG2_E, NUMBERS, backward_key_kernel, backward_query_kernel, forward_kernel

# The fastest of a dozen on an H200, for sequences of up to 512 and 1,024 tokens and for local windows
_FORWARD = {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 3}
_BACKWARD_QUERIES = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
_BACKWARD_KEYS = {"QUERIES": 32, "KEYS": 64, "num_warps": 4, "num_stages": 1}
_REGISTERS = {"maxnreg": 128}  # for _BACKWARD_KEYS on Hopper; on other GPUs, registers would spill


def varlen_attention(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    """[T, H, D]. A slot attends to slots of its own sequence that are at most `reach` slots away; None: to all of them.

    Args:
        query_THD, key_THD, value_THD: in fp16 or bf16, with contiguous dimensions; D is a power of 2, at least 16.
        cu_seqlens: int32 [S + 1], from 0 to T.
        max_length: no sequence is longer.
        scaling: of scores, positive.
        dropout: probability that an attention weight is dropped, less than 1.
    """
    output: Tensor
    options = (max_length, scaling, dropout, reach)
    output, *_ = _forward(query_THD, key_THD, value_THD, cu_seqlens, *options)
    return output


def varlen_qkv_attention(
    qkv_T3HD: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    """Compute `varlen_attention` for query, key and value in one tensor, which gets one gradient.

    rotation: cosines and sines of rotary positions of queries and keys, [T, D], with two equal halves; None: they have
        none.
    """
    cosines, sines = rotation or (None, None)
    options = (max_length, scaling, dropout, reach)
    output: Tensor = _QKVAttention.apply(qkv_T3HD, cosines, sines, cu_seqlens, *options)  # type: ignore[no-untyped-call]
    return output


class _QKVAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cosines: Tensor | None, sines: Tensor | None, bounds: Tensor, *options: Any
    ) -> Tensor:
        query, key, value = qkv.unbind(1)
        if cosines is not None and sines is not None:
            query, key = (apply_rotary(tensor, cosines, sines) for tensor in (query, key))
        output, logsumexp, seeds = _forward(query, key, value, bounds, *options)
        ctx.save_for_backward(query, key, value, bounds, output, logsumexp, seeds, cosines, sines)
        ctx.options = options
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.options), *[None] * (3 + len(ctx.options))


def apply_rotary(vectors_THD: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions as models of transformers compute them."""
    wide = vectors_THD.float()
    first, second = wide.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    return (wide * cosines[:, None] + rotated_half * sines[:, None]).to(vectors_THD.dtype)


# An operator, because torch.compile cannot trace Triton's interpreter.
@custom_op("deepcloze::varlen_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [T, H, D]; the logsumexp of scores, to base 2, fp32 [H, T]; and seeds of dropout, int64, if
    any."""
    assert query.shape == key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "dimensions must be contiguous"
    output, logsumexp, seeds = _allocate(query, dropout)
    if dropout:
        seeds.random_(-(2**63), None)
    _launch(
        forward_kernel,
        _FORWARD["QUERIES"],
        (query, key, value, bounds, seeds),
        (output, logsumexp),
        max_length,
        scaling * LOG2_E.value,
        **_constants(dropout, reach, max_length),
        **_FORWARD,
    )
    return output, logsumexp, seeds


@custom_op("deepcloze::varlen_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    seeds: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    """Return the gradients of query, key and value, [T, 3, H, D]. `gradient`: of the output, contiguous.

    cosines, sines: [T, D], of rotary positions of query and key; the gradients are with respect to the unrotated ones.
    """
    gradients = _allocate_gradients(gradient)
    deltas = torch.empty_like(logsumexp)  # dot products of each output and its gradient
    rotation = (deltas, deltas) if cosines is None or sines is None else (cosines.contiguous(), sines.contiguous())
    inputs = (query, key, value, bounds, seeds)
    constants = _constants(dropout, reach, max_length) | {"ROTATES": cosines is not None}
    _launch(
        backward_query_kernel,
        _BACKWARD_QUERIES["QUERIES"],
        inputs,
        (gradient, output, logsumexp, deltas, gradients, *rotation),
        max_length,
        scaling,
        **constants,
        **_BACKWARD_QUERIES,
    )
    on_hopper = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] == HOPPER
    _launch(
        backward_key_kernel,
        _BACKWARD_KEYS["KEYS"],
        inputs,
        (gradient, logsumexp, deltas, gradients, *rotation),
        max_length,
        scaling,
        **constants,
        **_BACKWARD_KEYS,
        **(_REGISTERS if on_hopper else {}),
    )
    return gradients


def _allocate(query: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    slots, heads, dimensions = query.shape
    return (
        query.new_empty(slots, heads, dimensions),
        query.new_empty(heads, slots, dtype=torch.float32),
        query.new_empty(2 if dropout else 0, dtype=torch.int64),
    )


def _allocate_gradients(gradient: Tensor, *_: Any) -> Tensor:
    slots, heads, dimensions = gradient.shape
    return gradient.new_empty(slots, 3, heads, dimensions)


_forward.register_fake(lambda query, *options: _allocate(query, options[-2]))
_backward.register_fake(_allocate_gradients)


def _launch(
    kernel: Any,
    block: int,
    inputs: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    max_length: int,
    scale: float,
    **options: int,
) -> None:
    """Run one program per block of a sequence and head, of `block` slots. inputs: query, key, value, bounds, seeds."""
    query, key, value, bounds, _ = inputs
    slots, heads, dimensions = query.shape
    blocks = triton.cdiv(max_length, block)
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:2]]
    kernel[blocks * (len(bounds) - 1), heads](
        *inputs, slots, heads, blocks, scale, *strides, *others, DIMENSIONS=dimensions, **options
    )


def _constants(dropout: float, reach: int | None, max_length: int) -> dict[str, int]:
    dropped = round(dropout * NUMBERS.value)
    assert dropped < NUMBERS.value, f"dropout {dropout} keeps no weight"
    return {"DROPPED": dropped, "REACH": -1 if reach is None or reach >= max_length else reach}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bounds, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bounds, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(gradient.contiguous(), *ctx.saved_tensors, None, None, *ctx.options)
    return (*gradients.unbind(1), *[None] * (1 + len(ctx.options)))


_forward.register_autograd(_differentiate, setup_context=_save)
