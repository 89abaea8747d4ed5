"""Kernels in Triton for `pretrain.modeling.varlen_attention`: a program computes one block of a sequence and head.

A weight is dropped if the product of a random odd number of its query and one of its key, modulo 2^32, is small. The
numbers are hashes of slots, heads and two seeds, which torch's generator draws in each call.

Triton's interpreter (`TRITON_INTERPRET=1`) runs them on a CPU.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NUMBERS = tl.constexpr(2.0**32)  # of 32 bits
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator]
def _find_block(bounds, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's head, the first slot of its block in its sequence, and the sequence's start and length."""
    sequence = tl.program_id(0) // blocks
    start = tl.load(bounds + sequence)
    length = tl.load(bounds + sequence + 1) - start
    return tl.program_id(1), tl.program_id(0) % blocks * BLOCK, start, length


@triton.jit
def _pointer(tensor, start, head, slot_stride, head_stride):  # type: ignore[no-untyped-def]
    """Return the pointer to one head of a sequence's first slot."""
    # In 64 bit: heads outside of slots, as rotary positions leave them, may be 2^31 elements apart.
    return tensor + start.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride


@triton.jit  # type: ignore[untyped-decorator]
def _load(tensor, rows, length, stride, DIMENSIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load [rows, DIMENSIONS] of one head and sequence; zeros from `length` on."""
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
    """Store the gradient of queries (part 0), keys (1) or values (2), before rotary positions if `ROTATES`."""
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
    """Return bool [queries, keys]: whether they attend to each other. `end`: of the keys."""
    attends = (keys < end)[None, :]
    if REACH >= 0:
        attends = attends & (tl.abs(queries[:, None] - keys[None, :]) <= REACH)
    return attends


@triton.jit
def _random(numbers, seed):  # type: ignore[no-untyped-def]
    """Odd numbers of 32 bits. Few operations: each thread computes its columns' numbers in each block."""
    bits = numbers.to(tl.uint32) * 0x9E3779B1 + tl.load(seed).to(tl.uint32)
    return bits ^ (bits >> 16) | 1


@triton.jit  # type: ignore[untyped-decorator]
def _drop(weights, numbers, others, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Replace with 0 the weights whose product of numbers is less than `DROPPED`."""
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
def forward_kernel(  # type: ignore[no-untyped-def]
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
    result = result / (total * (1.0 - DROPPED / NUMBERS))[:, None]
    output = _pointer(output, start, head, heads * DIMENSIONS, DIMENSIONS)
    _store(output, result, rows, length, heads * DIMENSIONS, DIMENSIONS)
    tl.store(logsumexp + head * slots + start + rows, largest + tl.log2(total), mask=rows < length)


@triton.jit  # type: ignore[untyped-decorator]
def backward_query_kernel(  # type: ignore[no-untyped-def]
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
    delta = tl.sum(upstream.to(tl.float32) * outputs.to(tl.float32), axis=1) * (1.0 - DROPPED / NUMBERS)
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
        scores = tl.dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        weights = tl.where(_attends(rows, columns, end, REACH), tl.exp2(scores - logarithm[:, None]), 0.0)
        grad_weights = tl.dot(upstream, tl.trans(values))
        kept = weights
        if DROPPED > 0:
            kept = _drop(weights, row_numbers[:, None], _random(start + columns, seeds + 1)[None, :], DROPPED)
        grad_scores = kept * grad_weights - weights * delta[:, None]
        result += tl.dot(grad_scores.to(keys.dtype), keys)
    result *= scale / (1.0 - DROPPED / NUMBERS)
    _store_gradient(gradients, 0, result, head, heads, start, rows, length, cosines, sines, DIMENSIONS, ROTATES)


@triton.jit  # type: ignore[untyped-decorator]
def backward_key_kernel(  # type: ignore[no-untyped-def]
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
    grad_keys = tl.zeros([KEYS, DIMENSIONS], tl.float32)
    grad_values = tl.zeros([KEYS, DIMENSIONS], tl.float32)
    begin, end = _within(first, length, KEYS, REACH)
    for at in range(begin, end, QUERIES):
        columns = at + tl.arange(0, QUERIES)
        queries = _load(query, columns, end, query_slots, DIMENSIONS)
        upstream = _load(gradient, columns, end, stride, DIMENSIONS)
        places = head * slots + start + columns
        logarithm = tl.load(logsumexp + places, mask=columns < end, other=float("inf"))  # weights of 0 after the end
        delta = tl.load(deltas + places, mask=columns < end, other=0.0)
        scores = tl.dot(keys, tl.trans(queries)) * (scale * LOG2_E)
        weights = tl.exp2(scores - logarithm[None, :])
        if REACH >= 0:
            weights = tl.where(_attends(rows, columns, end, REACH), weights, 0.0)
        grad_weights = tl.dot(values, tl.trans(upstream))
        kept = weights
        if DROPPED > 0:
            column_numbers = _random((start + columns) * heads + head, seeds)
            kept = _drop(weights, row_numbers[:, None], column_numbers[None, :], DROPPED)
        grad_values += tl.dot(kept.to(upstream.dtype), upstream)
        grad_scores = kept * grad_weights - weights * delta[None, :]
        grad_keys += tl.dot(grad_scores.to(queries.dtype), queries)
    grad_keys *= scale / (1.0 - DROPPED / NUMBERS)
    _store_gradient(gradients, 1, grad_keys, head, heads, start, rows, length, cosines, sines, DIMENSIONS, ROTATES)
    grad_values *= 1.0 / (1.0 - DROPPED / NUMBERS)
    _store_gradient(gradients, 2, grad_values, head, heads, start, rows, length, cosines, sines, DIMENSIONS, False)
