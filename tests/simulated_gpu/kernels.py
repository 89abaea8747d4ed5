"""Operators that torch has for CUDA only, and the Triton kernel, on the CPU: in fp32 inside, and strict about their
arguments. (Triton's interpreter takes 10 ms per row of logits; `test_fused_head.py` runs it.)

Shapes: T slots of all sequences, H heads, D dimensions of a head, S sequences.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def register_kernels(library: torch.library.Library, calls: Counter[str]) -> None:
    """`library`: fragments of `aten`. `calls`: is counted up."""
    for name, kernel in (
        ("_flash_attention_forward", flash_attention_forward),
        ("_flash_attention_backward", flash_attention_backward),
        ("addmm.dtype_out", addmm_in_fp32),
    ):
        library.impl(name, _counted(name, kernel, calls), "CPU")


def _counted(name: str, kernel: Any, calls: Counter[str]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **options)

    return call


def flash_attention_forward(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """As FlashAttention-2 for sequences of different lengths, which does not check everything that it relies on."""
    inputs = (query_THD, key_THD, value_THD)
    _require("no causal mask, and no option that is not known here", not is_causal, not return_debug_mask)
    _require(f"no option that is not known here: {others}", all(value is None for value in others.values()))
    _require("inputs of the same shape", *(tensor.shape == query_THD.shape for tensor in inputs))
    _require(f"inputs in 16 bit: {[tensor.dtype for tensor in inputs]}", query_THD.dtype in _HALF)
    _require("inputs of the same dtype", *(tensor.dtype == query_THD.dtype for tensor in inputs))
    _require("a head size of at most 256, a multiple of 8", query_THD.shape[-1] % 8 == 0, query_THD.shape[-1] <= 256)
    _require("heads whose dimensions are contiguous", *(tensor.stride(-1) == 1 for tensor in inputs))
    _require("a window as wide on both sides", window_size_left == window_size_right, (window_size_left or 0) >= 0)
    _require("the same bounds for queries and keys", torch.equal(cu_seqlens_q, cu_seqlens_k), max_q == max_k)
    lengths = cu_seqlens_q.diff()
    _require("bounds in int32, contiguous", cu_seqlens_q.dtype == torch.int32, cu_seqlens_q.is_contiguous())
    _require("no slots outside of sequences", cu_seqlens_q[0] == 0, cu_seqlens_q[-1] == len(query_THD))
    _require("no sequence that is longer than the maximum length", lengths.min() >= 0, lengths.max() <= max_q)
    seed = torch.randint(2**62, (2,)) if dropout else torch.zeros(2, dtype=torch.int64)
    weights, kept, logsumexp = _weights(query_THD, key_THD, cu_seqlens_q, dropout, scale, window_size_left, seed)
    output = torch.einsum("hts,shd->thd", weights * kept, value_THD.float()).to(query_THD.dtype)
    unused = torch.empty((), dtype=torch.uint64)
    return output, logsumexp, seed.view(torch.uint64), unused, torch.empty(0, dtype=query_THD.dtype)


def flash_attention_backward(
    gradient_THD: Tensor,
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    output_THD: Tensor,
    logsumexp_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    seed: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _require("gradients of the output's shape", gradient_THD.shape == output_THD.shape == query_THD.shape)
    _require("gradients of the output's dtype", gradient_THD.dtype == output_THD.dtype == query_THD.dtype)
    weights, kept, logsumexp = _weights(
        query_THD, key_THD, cu_seqlens_q, dropout, scale, window_size_left, seed.view(torch.int64)
    )
    _require("what the forward pass has returned", torch.equal(logsumexp, logsumexp_HT))
    gradient = gradient_THD.float()
    of_value = torch.einsum("hts,thd->shd", weights * kept, gradient)
    of_weights = torch.einsum("thd,shd->hts", gradient, value_THD.float()) * kept
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_query = torch.einsum("hts,shd->thd", of_scores, key_THD.float())
    of_key = torch.einsum("hts,thd->shd", of_scores, query_THD.float())
    return of_query.to(query_THD.dtype), of_key.to(query_THD.dtype), of_value.to(query_THD.dtype)


def _require(what: str, *conditions: Any) -> None:
    if not all(conditions):
        raise AssertionError(f"a kernel requires {what}")


def _weights(
    query_THD: Tensor,
    key_THD: Tensor,
    bounds: Tensor,
    dropout: float,
    scale: float,
    window: int | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [H, T, T] before dropout, what dropout multiplies them by, and the logarithms of their sums [H, T].

    window: slots attended to on each side; None: all of the sequence.
    """
    slot = torch.arange(len(query_THD))
    sequence = torch.searchsorted(bounds, slot.int(), right=True)
    blocked = sequence[:, None] != sequence[None, :]
    if window is not None:
        blocked |= (slot[:, None] - slot[None, :]).abs() > window
    scores = torch.einsum("thd,shd->hts", query_THD.float(), key_THD.float()) * scale
    scores = scores.masked_fill(blocked, -torch.inf)
    kept = torch.ones_like(scores)
    if dropout:
        generator = torch.Generator().manual_seed(int(seed[0]))
        kept = (torch.rand(scores.shape, generator=generator) >= dropout) / (1 - dropout)
    return scores.softmax(-1), kept, scores.logsumexp(-1)


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
    """As `pretrain.modeling.varlen_attention.varlen_attention`, which computes what flash attention does."""
    _require("a head size that is a power of 2", query_THD.shape[-1] == 64)
    output_THD, *_ = torch.ops.aten._flash_attention_forward(
        *(query_THD, key_THD, value_THD, cu_seqlens, cu_seqlens, max_length, max_length, dropout, False, False),
        scale=scaling,
        window_size_left=reach,
        window_size_right=reach,
    )
    assert isinstance(output_THD, Tensor)
    return output_THD


def varlen_qkv_attention(qkv_T3HD: Tensor, rotation: tuple[Tensor, Tensor] | None, *options: Any) -> Tensor:
    """As `pretrain.modeling.varlen_attention.varlen_qkv_attention`."""
    from pretrain.modeling.varlen_attention import apply_rotary  # imports Triton

    query, key, value = qkv_T3HD.unbind(1)
    if rotation is not None:
        query, key = (apply_rotary(tensor, *rotation) for tensor in (query, key))
    return varlen_attention(query, key, value, *options)


def addmm_in_fp32(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    """`total` + a product of 16-bit matrices, accumulated in fp32."""
    _require("matrices in 16 bit", left.dtype == right.dtype, left.dtype in _HALF)
    _require("a sum in fp32", total.dtype == out_dtype == out.dtype == torch.float32)
    _require("factors of 1", beta == alpha == 1)
    return torch.add(total, left.float() @ right.float(), out=out)


def cross_entropy_kernel(
    logits_CP: Tensor,
    width: int,
    columns: int,
    bias_P: Tensor | None,
    labels_C: Tensor,
    losses_C: Tensor,
    correct_C: Tensor | None,
    scale: float,
    *,
    IGNORED: int,
    HAS_BIAS: bool,
    WANTS_GRADIENT: bool,
    BLOCK: int,
    num_warps: int,
) -> None:
    """As the kernel in `pretrain.modeling.cross_entropy_kernel`. C: rows of a chunk, P: the vocabulary with padding."""
    others = [tensor for tensor in (labels_C, losses_C, correct_C) if tensor is not None]
    _require("logits of this width", logits_CP.is_contiguous(), logits_CP.shape == (len(labels_C), width))
    _require("contiguous rows", *(tensor.is_contiguous() for tensor in others))
    _require("its dtypes", [labels_C.dtype, losses_C.dtype] == [torch.int64, torch.float32])
    _require("a bias if it says so", (bias_P is not None) == HAS_BIAS, bias_P is None or len(bias_P) == width)
    _require("a power of two", BLOCK & (BLOCK - 1) == 0)
    values = (logits_CP.float() if bias_P is None else logits_CP.float() + bias_P.float())[:, :columns]
    counts = labels_C != IGNORED
    label = labels_C.masked_fill(~counts, 0)
    losses_C.copy_(torch.nn.functional.cross_entropy(values, label, reduction="none") * counts)
    if not WANTS_GRADIENT:
        assert correct_C is not None
        _require("its dtype", correct_C.dtype == torch.int32)
        correct_C.copy_((values.argmax(-1) == label) & counts)
    else:
        gradient = values.softmax(-1)
        gradient[torch.arange(len(label)), label] -= 1.0
        logits_CP[:, :columns] = gradient * scale * counts[:, None]
