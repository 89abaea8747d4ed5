"""Attention in a local window over packed sequences: Triton kernels, without dropout.

FlashAttention-2 computes whole blocks of 128 keys at both ends of a window. Here a block has 64 slots: with
ModernBERT's window of 64 on each side, a block of queries needs three of keys.

Method: Dao 2023, "FlashAttention-2", arXiv 2307.08691: blocks of scores are computed, used and forgotten, and computed
again in the backward pass from the saved logarithm of their sum.

Importing this module imports Triton. Its interpreter (`TRITON_INTERPRET=1`) runs the kernels on a CPU.

Shapes: T slots, H heads, D dimensions of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

_BLOCK = 64  # slots
_LOG2_E = tl.constexpr(1.4426950408889634)
_OPTIONS = {"num_warps": 4, "num_stages": 1}  # on an H200 7 to 15 % faster than with 2 stages


def local_attention(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, segments_T: Tensor, scaling: float, reach: int
) -> Tensor:
    """[T, H, D]. A slot attends to slots of its own segment that are at most `reach` slots away.

    Args:
        query_THD, key_THD, value_THD: in fp16 or bf16, with contiguous dimensions; D is a power of 2, at least 16.
        segments_T: int32.
    """
    output: Tensor
    output, _ = _forward(query_THD, key_THD, value_THD, segments_T, scaling, reach)
    return output


# torch.compile does not look inside an operator, which Triton's interpreter would not survive.
@custom_op("deepcloze::local_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scaling: float, reach: int
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms to base 2 of the sums of exponentials, fp32 [H, T]."""
    assert query.shape == key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "dimensions must be contiguous"
    output, sums = _allocate(query)
    length, heads, dimensions = query.shape
    _forward_kernel[(triton.cdiv(length, _BLOCK), heads)](
        query,
        key,
        value,
        segments,
        output,
        sums,
        length,
        heads,
        scaling * _LOG2_E.value,
        *_strides(query, key, value),
        REACH=reach,
        DIMENSIONS=dimensions,
        BLOCK=_BLOCK,
        **_OPTIONS,
    )
    return output, sums


@custom_op("deepcloze::local_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    output: Tensor,
    sums: Tensor,
    scaling: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value. `gradient` is contiguous, as `output`."""
    length, heads, dimensions = query.shape
    grid = (triton.cdiv(length, _BLOCK), heads)
    query_gradient, key_gradient, value_gradient = gradients = _allocate_gradients(gradient)
    products = torch.empty_like(sums)  # of each output and its gradient, summed over dimensions
    constants = {"REACH": reach, "DIMENSIONS": dimensions, "BLOCK": _BLOCK}
    _query_kernel[grid](
        gradient,
        query,
        key,
        value,
        segments,
        output,
        sums,
        products,
        query_gradient,
        length,
        heads,
        scaling,
        *_strides(query, key, value),
        **constants,
        **_OPTIONS,
    )
    _key_kernel[grid](
        gradient,
        query,
        key,
        value,
        segments,
        sums,
        products,
        key_gradient,
        value_gradient,
        length,
        heads,
        scaling,
        *_strides(query, key, value),
        **constants,
        **_OPTIONS,
    )
    return gradients


def _allocate(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    length, heads, dimensions = query.shape
    return query.new_empty(length, heads, dimensions), query.new_empty(heads, length, dtype=torch.float32)


def _allocate_gradients(gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gradient), torch.empty_like(gradient), torch.empty_like(gradient)


_forward.register_fake(_allocate)
_backward.register_fake(_allocate_gradients)


def _strides(*tensors: Tensor) -> list[int]:
    """Of slots and heads."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.reach = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scaling, ctx.reach), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@triton.jit  # type: ignore[untyped-decorator]
def _load(tensor, slots, length, stride, DIMENSIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[slots, DIMENSIONS] of one head; zeros outside of the tensor."""
    columns = tl.arange(0, DIMENSIONS)
    inside = (slots >= 0) & (slots < length)
    return tl.load(tensor + slots[:, None].to(tl.int64) * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(tensor, head, heads, values, slots, length, DIMENSIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a contiguous tensor [T, H, D]."""
    places = (slots[:, None].to(tl.int64) * heads + head) * DIMENSIONS + tl.arange(0, DIMENSIONS)[None, :]
    tl.store(tensor + places, values.to(tensor.dtype.element_ty), mask=(slots < length)[:, None])


@triton.jit
def _load_row(row, slots, length, other):  # type: ignore[no-untyped-def]
    return tl.load(row + slots, mask=(slots >= 0) & (slots < length), other=other)


@triton.jit  # type: ignore[untyped-decorator]
def _attends(slots, segment, others, other_segment, REACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[slots, others]: whether they attend to each other."""
    distance = tl.abs(slots[:, None] - others[None, :])
    return (segment[:, None] == other_segment[None, :]) & (distance <= REACH)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    segments,
    output,
    sums,
    length,
    heads,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    REACH: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of queries and head. scale: of scores, times log2(e)."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    slots = first + tl.arange(0, BLOCK)
    queries = _load(query + head * query_heads, slots, length, query_slots, DIMENSIONS)
    segment = _load_row(segments, slots, length, -1)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, DIMENSIONS], tl.float32)
    around: tl.constexpr = (REACH + BLOCK - 1) // BLOCK
    for step in range(-around, around + 1):
        others = first + step * BLOCK + tl.arange(0, BLOCK)
        keys = _load(key + head * key_heads, others, length, key_slots, DIMENSIONS)
        values = _load(value + head * value_heads, others, length, value_slots, DIMENSIONS)
        other_segment = _load_row(segments, others, length, -2)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(_attends(slots, segment, others, other_segment, REACH), scores, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
        finite = tl.where(largest == -float("inf"), 0.0, largest)  # no slot of this block so far
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(before - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
    total = tl.where(slots < length, total, 1.0)  # of a slot, at least its own weight
    _store(output, head, heads, result / total[:, None], slots, length, DIMENSIONS)
    tl.store(sums + head * length + slots, largest + tl.log2(total), mask=slots < length)


@triton.jit  # type: ignore[untyped-decorator]
def _query_kernel(  # type: ignore[no-untyped-def]
    gradient,
    query,
    key,
    value,
    segments,
    output,
    sums,
    products,
    query_gradient,
    length,
    heads,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    REACH: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of queries and head: their gradients, and `products` for the other kernel."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    slots = first + tl.arange(0, BLOCK)
    queries = _load(query + head * query_heads, slots, length, query_slots, DIMENSIONS)
    upstream = _load(gradient + head * DIMENSIONS, slots, length, heads * DIMENSIONS, DIMENSIONS)
    outputs = _load(output + head * DIMENSIONS, slots, length, heads * DIMENSIONS, DIMENSIONS)
    product = tl.sum(upstream.to(tl.float32) * outputs.to(tl.float32), axis=1)
    tl.store(products + head * length + slots, product, mask=slots < length)
    segment = _load_row(segments, slots, length, -1)
    logarithm = _load_row(sums + head * length, slots, length, 0.0)
    result = tl.zeros([BLOCK, DIMENSIONS], tl.float32)
    around: tl.constexpr = (REACH + BLOCK - 1) // BLOCK
    for step in range(-around, around + 1):
        others = first + step * BLOCK + tl.arange(0, BLOCK)
        keys = _load(key + head * key_heads, others, length, key_slots, DIMENSIONS)
        values = _load(value + head * value_heads, others, length, value_slots, DIMENSIONS)
        other_segment = _load_row(segments, others, length, -2)
        scores = tl.dot(queries, tl.trans(keys)) * (scale * _LOG2_E)
        attends = _attends(slots, segment, others, other_segment, REACH)
        weights = tl.where(attends, tl.exp2(scores - logarithm[:, None]), 0.0)
        of_weights = tl.dot(upstream, tl.trans(values))
        of_scores = weights * (of_weights - product[:, None])
        result += tl.dot(of_scores.to(keys.dtype), keys)
    _store(query_gradient, head, heads, result * scale, slots, length, DIMENSIONS)


@triton.jit  # type: ignore[untyped-decorator]
def _key_kernel(  # type: ignore[no-untyped-def]
    gradient,
    query,
    key,
    value,
    segments,
    sums,
    products,
    key_gradient,
    value_gradient,
    length,
    heads,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    REACH: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of keys and head: the gradients of keys and values. Scores are transposed."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    slots = first + tl.arange(0, BLOCK)
    keys = _load(key + head * key_heads, slots, length, key_slots, DIMENSIONS)
    values = _load(value + head * value_heads, slots, length, value_slots, DIMENSIONS)
    segment = _load_row(segments, slots, length, -1)
    of_keys = tl.zeros([BLOCK, DIMENSIONS], tl.float32)
    of_values = tl.zeros([BLOCK, DIMENSIONS], tl.float32)
    around: tl.constexpr = (REACH + BLOCK - 1) // BLOCK
    for step in range(-around, around + 1):
        others = first + step * BLOCK + tl.arange(0, BLOCK)
        queries = _load(query + head * query_heads, others, length, query_slots, DIMENSIONS)
        upstream = _load(gradient + head * DIMENSIONS, others, length, heads * DIMENSIONS, DIMENSIONS)
        other_segment = _load_row(segments, others, length, -2)
        logarithm = _load_row(sums + head * length, others, length, 0.0)
        product = _load_row(products + head * length, others, length, 0.0)
        scores = tl.dot(keys, tl.trans(queries)) * (scale * _LOG2_E)
        attends = _attends(slots, segment, others, other_segment, REACH)
        weights = tl.where(attends, tl.exp2(scores - logarithm[None, :]), 0.0)
        of_values += tl.dot(weights.to(upstream.dtype), upstream)
        of_weights = tl.dot(values, tl.trans(upstream))
        of_scores = weights * (of_weights - product[None, :])
        of_keys += tl.dot(of_scores.to(queries.dtype), queries)
    _store(key_gradient, head, heads, of_keys * scale, slots, length, DIMENSIONS)
    _store(value_gradient, head, heads, of_values, slots, length, DIMENSIONS)
