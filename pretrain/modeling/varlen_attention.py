"""Flash attention over packed sequences, with dropout and local windows: Triton kernels.

FlashAttention-2 computes blocks of 128 queries and keys, most of which is masked at the end of a short sequence and at
both ends of a local window. Here a block has 64 slots: with ModernBERT's window of 64 on each side, a block of queries
needs three of keys. Matrix products use Hopper's own instructions (wgmma), which FlashAttention-2 does not.

Method: Dao 2023, "FlashAttention-2", arXiv 2307.08691: scores are computed block by block and never stored. The
backward pass recomputes the weights from the scores and the saved logsumexp of each query.

A weight is dropped if the product of a random odd number of its query and one of its key, modulo 2^32, is small. The
numbers are hashes of slots, heads and two seeds, which torch's generator draws in each call.

The gradients of queries, keys and values are parts of one tensor, as the layer that computed all three needs them:
those of the queries and keys before rotary positions (Su et al. 2021, arXiv 2104.09864), if there are any.

Importing this module imports Triton. Its interpreter (`TRITON_INTERPRET=1`) runs the kernels on a CPU.

Shapes: T slots, S sequences, H heads, D dimensions of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from experiment.hardware import HOPPER

_LOG2_E = tl.constexpr(1.4426950408889634)
_NUMBERS = tl.constexpr(2.0**32)  # of 32 bits
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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
    options = (max_length, scaling, dropout, _known_reach(reach, max_length))
    output, *_ = _forward(query_THD, key_THD, value_THD, cu_seqlens, *options)
    return output


def qkv_attention(
    qkv_T3HD: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    """`varlen_attention` for query, key and value in one tensor, which gets one gradient.

    rotation: cosines and sines of rotary positions of queries and keys, [T, D], with two equal halves; None: they have
        none.
    """
    cosines, sines = rotation or (None, None)
    options = (max_length, scaling, dropout, _known_reach(reach, max_length))
    output: Tensor = _QKVAttention.apply(qkv_T3HD, cosines, sines, cu_seqlens, *options)  # type: ignore[no-untyped-call]
    return output


def _known_reach(reach: int | None, max_length: int) -> int:
    """-1 if slots attend to all of their sequence."""
    return -1 if reach is None or reach >= max_length else reach


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
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [T, H, D]; the logsumexp of scores, to base 2, fp32 [H, T]; and seeds of dropout, int64, if any."""
    assert query.shape == key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "dimensions must be contiguous"
    output, logsumexp, seeds = _allocate(query, dropout)
    if dropout:
        seeds.random_(-(2**63), None)
    _launch(
        _forward_kernel,
        _FORWARD["QUERIES"],
        (query, key, value, bounds, seeds),
        (output, logsumexp),
        max_length,
        scaling * _LOG2_E.value,
        **_constants(dropout, reach),
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
    reach: int,
) -> Tensor:
    """[T, 3, H, D], the gradients of query, key and value. `gradient` is that of the output, and contiguous.

    cosines, sines: [T, D], of rotary positions of query and key; the gradients are with respect to the unrotated ones.
    """
    gradients = _allocate_gradients(gradient)
    deltas = torch.empty_like(logsumexp)  # dot products of each output and its gradient
    rotation = (deltas, deltas) if cosines is None or sines is None else (cosines.contiguous(), sines.contiguous())
    inputs = (query, key, value, bounds, seeds)
    constants = _constants(dropout, reach) | {"ROTATES": cosines is not None}
    _launch(
        _backward_query_kernel,
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
        _backward_key_kernel,
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


def _constants(dropout: float, reach: int) -> dict[str, int]:
    dropped = round(dropout * _NUMBERS.value)
    assert dropped < _NUMBERS.value, f"dropout {dropout} keeps no weight"
    return {"DROPPED": dropped, "REACH": reach}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bounds, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bounds, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(gradient.contiguous(), *ctx.saved_tensors, None, None, *ctx.options)
    return (*gradients.unbind(1), *[None] * (1 + len(ctx.options)))


_forward.register_autograd(_differentiate, setup_context=_save)


@triton.jit  # type: ignore[untyped-decorator]
def _find_block(bounds, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's head, the first slot of its block in its sequence, and the sequence's start and length."""
    sequence = tl.program_id(0) // blocks
    start = tl.load(bounds + sequence)
    length = tl.load(bounds + sequence + 1) - start
    return tl.program_id(1), tl.program_id(0) % blocks * BLOCK, start, length


@triton.jit
def _pointer(tensor, start, head, slot_stride, head_stride):  # type: ignore[no-untyped-def]
    """The pointer to one head of a sequence's first slot."""
    # In 64 bit: heads outside of slots, as rotary positions leave them, may be 2^31 elements apart.
    return tensor + start.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride


@triton.jit  # type: ignore[untyped-decorator]
def _load(tensor, rows, length, stride, DIMENSIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, DIMENSIONS] of one head and sequence; zeros from `length` on."""
    places = rows[:, None] * stride + tl.arange(0, DIMENSIONS)[None, :]
    return tl.load(tensor + places, mask=(rows < length)[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(tensor, values, rows, length, stride, DIMENSIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    places = rows[:, None] * stride + tl.arange(0, DIMENSIONS)[None, :]
    tl.store(tensor + places, values.to(tensor.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _store_gradient(  # type: ignore[no-untyped-def]
    gradients,
    PART: tl.constexpr,
    values,
    head,
    heads,
    start,
    rows,
    length,
    cosines,
    sines,
    DIMENSIONS: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """The gradient of queries (part 0), keys (1) or values (2), before rotary positions if `ROTATES`."""
    part = heads * DIMENSIONS
    place = _pointer(gradients, start, head, 3 * part, DIMENSIONS) + PART * part
    if ROTATES:
        HALF: tl.constexpr = DIMENSIONS // 2
        first, second = tl.split(tl.permute(tl.reshape(values, values.shape[0], 2, HALF), 0, 2, 1))
        cosines = _pointer(cosines, start, head, DIMENSIONS, 0)
        sines = _pointer(sines, start, head, DIMENSIONS, 0)
        cosine = _load(cosines, rows, length, DIMENSIONS, HALF).to(tl.float32)
        sine = _load(sines, rows, length, DIMENSIONS, HALF).to(tl.float32)
        _store(place, first * cosine + second * sine, rows, length, 3 * part, HALF)
        _store(place + HALF, second * cosine - first * sine, rows, length, 3 * part, HALF)
    else:
        _store(place, values, rows, length, 3 * part, DIMENSIONS)


@triton.jit  # type: ignore[untyped-decorator]
def _within(first, length, BLOCK: tl.constexpr, REACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """First slot, and the one after the last, that the slots of a block attend to. `first`: of the block."""
    if REACH < 0:
        return 0, length
    return tl.maximum(first - REACH, 0), tl.minimum(first + BLOCK + REACH, length)


@triton.jit  # type: ignore[untyped-decorator]
def _attends(queries, keys, end, REACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """bool [queries, keys]: whether they attend to each other. `end`: of the keys."""
    attends = (keys < end)[None, :]
    if REACH >= 0:
        attends = attends & (tl.abs(queries[:, None] - keys[None, :]) <= REACH)
    return attends


@triton.jit
def _random(numbers, seed):  # type: ignore[no-untyped-def]
    """Odd numbers of 32 bits. Few operations: each thread computes those of its columns in each block."""
    bits = numbers.to(tl.uint32) * 0x9E3779B1 + tl.load(seed).to(tl.uint32)
    return bits ^ (bits >> 16) | 1


@triton.jit  # type: ignore[untyped-decorator]
def _drop(weights, numbers, others, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 in place of the weights whose product of numbers is less than `DROPPED`."""
    if _INTERPRETED:
        return tl.where(numbers * others >= DROPPED, weights, 0.0)
    # As three operations together: else the comparisons of a block come first, and their results are kept as numbers.
    return tl.inline_asm_elementwise(
        """{
            .reg .pred kept;
            .reg .u32 product;
            mul.lo.u32 product, $2, $3;
            setp.ge.u32 kept, product, $4;
            selp.f32 $0, $1, 0f00000000, kept;
        }""",
        "=f,f,r,r,r",
        [weights, numbers, others, tl.full([], DROPPED, tl.uint32)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bounds,
    seeds,
    slots,
    heads,
    blocks,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    output,
    logsumexp,
    DIMENSIONS: tl.constexpr,
    DROPPED: tl.constexpr,
    REACH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per block of queries and head. scale: of scores, times log2(e). `*_slots` and `*_heads`: strides."""
    head, first, start, length = _find_block(bounds, blocks, QUERIES)
    if first >= length:
        return
    query = _pointer(query, start, head, query_slots, query_heads)
    key = _pointer(key, start, head, key_slots, key_heads)
    value = _pointer(value, start, head, value_slots, value_heads)
    rows = first + tl.arange(0, QUERIES)
    queries = _load(query, rows, length, query_slots, DIMENSIONS)
    if DROPPED > 0:
        row_numbers = _random((start + rows) * heads + head, seeds)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIMENSIONS], tl.float32)
    begin, end = _within(first, length, QUERIES, REACH)
    for at in range(begin, end, KEYS):
        columns = at + tl.arange(0, KEYS)
        keys = _load(key, columns, end, key_slots, DIMENSIONS)
        scores = tl.dot(queries, tl.trans(keys))
        scores = tl.where(_attends(rows, columns, end, REACH), scores, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1) * scale)
        finite = largest
        if REACH >= 0:  # a row may attend to no slot so far
            finite = tl.where(largest == -float("inf"), 0.0, largest)
        weights = tl.exp2(scores * scale - finite[:, None])
        shrink = tl.exp2(before - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPPED > 0:
            weights = _drop(weights, row_numbers[:, None], _random(start + columns, seeds + 1)[None, :], DROPPED)
        values = _load(value, columns, end, value_slots, DIMENSIONS)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
    total = tl.where(rows < length, total, 1.0)
    result = result / (total * (1.0 - DROPPED / _NUMBERS))[:, None]
    output = _pointer(output, start, head, heads * DIMENSIONS, DIMENSIONS)
    _store(output, result, rows, length, heads * DIMENSIONS, DIMENSIONS)
    tl.store(logsumexp + head * slots + start + rows, largest + tl.log2(total), mask=rows < length)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_query_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bounds,
    seeds,
    slots,
    heads,
    blocks,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    gradient,
    output,
    logsumexp,
    deltas,
    gradients,
    cosines,
    sines,
    DIMENSIONS: tl.constexpr,
    DROPPED: tl.constexpr,
    REACH: tl.constexpr,
    ROTATES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per block of queries and head: their gradients, and `deltas` for the other kernel."""
    head, first, start, length = _find_block(bounds, blocks, QUERIES)
    if first >= length:
        return
    query = _pointer(query, start, head, query_slots, query_heads)
    key = _pointer(key, start, head, key_slots, key_heads)
    value = _pointer(value, start, head, value_slots, value_heads)
    stride = heads * DIMENSIONS
    gradient = _pointer(gradient, start, head, stride, DIMENSIONS)
    output = _pointer(output, start, head, stride, DIMENSIONS)
    rows = first + tl.arange(0, QUERIES)
    queries = _load(query, rows, length, query_slots, DIMENSIONS)
    upstream = _load(gradient, rows, length, stride, DIMENSIONS)
    outputs = _load(output, rows, length, stride, DIMENSIONS)
    delta = tl.sum(upstream.to(tl.float32) * outputs.to(tl.float32), axis=1) * (1.0 - DROPPED / _NUMBERS)
    places = head * slots + start + rows
    tl.store(deltas + places, delta, mask=rows < length)
    logarithm = tl.load(logsumexp + places, mask=rows < length, other=float("inf"))
    if DROPPED > 0:
        row_numbers = _random((start + rows) * heads + head, seeds)
    result = tl.zeros([QUERIES, DIMENSIONS], tl.float32)
    begin, end = _within(first, length, QUERIES, REACH)
    for at in range(begin, end, KEYS):
        columns = at + tl.arange(0, KEYS)
        keys = _load(key, columns, end, key_slots, DIMENSIONS)
        values = _load(value, columns, end, value_slots, DIMENSIONS)
        scores = tl.dot(queries, tl.trans(keys)) * (scale * _LOG2_E)
        weights = tl.where(_attends(rows, columns, end, REACH), tl.exp2(scores - logarithm[:, None]), 0.0)
        of_weights = tl.dot(upstream, tl.trans(values))
        kept = weights
        if DROPPED > 0:
            kept = _drop(weights, row_numbers[:, None], _random(start + columns, seeds + 1)[None, :], DROPPED)
        of_scores = kept * of_weights - weights * delta[:, None]
        result += tl.dot(of_scores.to(keys.dtype), keys)
    result *= scale / (1.0 - DROPPED / _NUMBERS)
    _store_gradient(gradients, 0, result, head, heads, start, rows, length, cosines, sines, DIMENSIONS, ROTATES)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_key_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bounds,
    seeds,
    slots,
    heads,
    blocks,
    scale,
    query_slots,
    query_heads,
    key_slots,
    key_heads,
    value_slots,
    value_heads,
    gradient,
    logsumexp,
    deltas,
    gradients,
    cosines,
    sines,
    DIMENSIONS: tl.constexpr,
    DROPPED: tl.constexpr,
    REACH: tl.constexpr,
    ROTATES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per block of keys and head: the gradients of keys and values. Scores are transposed."""
    head, first, start, length = _find_block(bounds, blocks, KEYS)
    if first >= length:
        return
    query = _pointer(query, start, head, query_slots, query_heads)
    key = _pointer(key, start, head, key_slots, key_heads)
    value = _pointer(value, start, head, value_slots, value_heads)
    stride = heads * DIMENSIONS
    gradient = _pointer(gradient, start, head, stride, DIMENSIONS)
    rows = first + tl.arange(0, KEYS)
    keys = _load(key, rows, length, key_slots, DIMENSIONS)
    values = _load(value, rows, length, value_slots, DIMENSIONS)
    if DROPPED > 0:
        row_numbers = _random(start + rows, seeds + 1)
    of_keys = tl.zeros([KEYS, DIMENSIONS], tl.float32)
    of_values = tl.zeros([KEYS, DIMENSIONS], tl.float32)
    begin, end = _within(first, length, KEYS, REACH)
    for at in range(begin, end, QUERIES):
        columns = at + tl.arange(0, QUERIES)
        queries = _load(query, columns, end, query_slots, DIMENSIONS)
        upstream = _load(gradient, columns, end, stride, DIMENSIONS)
        places = head * slots + start + columns
        logarithm = tl.load(logsumexp + places, mask=columns < end, other=float("inf"))  # weights of 0 after the end
        delta = tl.load(deltas + places, mask=columns < end, other=0.0)
        scores = tl.dot(keys, tl.trans(queries)) * (scale * _LOG2_E)
        weights = tl.exp2(scores - logarithm[None, :])
        if REACH >= 0:
            weights = tl.where(_attends(rows, columns, end, REACH), weights, 0.0)
        of_weights = tl.dot(values, tl.trans(upstream))
        kept = weights
        if DROPPED > 0:
            column_numbers = _random((start + columns) * heads + head, seeds)
            kept = _drop(weights, row_numbers[:, None], column_numbers[None, :], DROPPED)
        of_values += tl.dot(kept.to(upstream.dtype), upstream)
        of_scores = kept * of_weights - weights * delta[None, :]
        of_keys += tl.dot(of_scores.to(queries.dtype), queries)
    of_keys *= scale / (1.0 - DROPPED / _NUMBERS)
    _store_gradient(gradients, 1, of_keys, head, heads, start, rows, length, cosines, sines, DIMENSIONS, ROTATES)
    of_values *= 1.0 / (1.0 - DROPPED / _NUMBERS)
    _store_gradient(gradients, 2, of_values, head, heads, start, rows, length, cosines, sines, DIMENSIONS, False)
