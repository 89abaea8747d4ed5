"""Attention for packed rows, registered in `transformers.AttentionInterface`.

A packed row holds several sequences, and a slot attends to its own sequence only. The model passes the keyword
`packing` on, which says so. transformers builds no attention mask, because the name is not registered in its mask
interface.

Three kernels compute the same result, see `packed_attention`:
- matmul, on a CPU: matmul, masked softmax, matmul over rows. Measured 3-5 times faster than
  scaled_dot_product_attention with a mask, nested tensors or a loop over sequences, as long as rows are short.
- flash, on CUDA in 16 bit: flash attention over concatenated sequences, which skips pairs of slots of different
  sequences (Dao 2023, arXiv 2307.08691). Where it is faster, a kernel of our own, see
  `choose_varlen_kernels`; else FlashAttention-2.
- sdpa, on CUDA otherwise: scaled_dot_product_attention with a mask.

Shapes: B rows, W slots, T = B · W, J = 3 for query, key and value, H heads, D dimensions of a head, M predicted
positions, Q the largest number of predicted slots in a row.
"""

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from experiment.errors import first_line
from experiment.models.dropout import fast_dropout
from experiment.process.hardware import HOPPER

log = logging.getLogger(__name__)

_PACKED = "deepcloze_packed"

Capability = tuple[int, int]
"""Compute capability of a CUDA device: major and minor number."""

FlashKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float, int | None], Tensor]
"""`flash_attention_2`, or `pretrain.modeling.varlen_attention.varlen_attention`."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, for each dimension of a head; both halves are equal."""

_VARLEN_HEAD_SIZE, _LOCAL_REACH = 64, 64  # measured on an H200


class VarlenKernels(NamedTuple):
    """The kernels of `pretrain.modeling.varlen_attention`."""

    attend: FlashKernel  # varlen_attention
    attend_qkv: Callable[[Tensor, Rotation | None, Tensor, int, float, float, int | None], Tensor]


class Predicted(NamedTuple):
    """The slots of a microbatch that are predicted. See the fields of a `pretrain.batching.batch.Microbatch`."""

    positions: Tensor  # [M], its `masked_positions`
    columns: Tensor  # [B, Q], its `predicted_columns`
    entries: Tensor  # [M], its `predicted_entries`

    @property
    def by_row(self) -> bool:
        return self.columns.shape[1] > 0

    def select(self, output_BWHD: Tensor) -> Tensor:
        """Select the predicted slots, [1, M, H, D], of the output for all."""
        return output_BWHD.flatten(0, 1)[self.positions][None]


class Packing:
    """The slots of a microbatch that attend to each other. Masks are computed once for all layers.

    Padding attends to padding, so that each softmax has something to sum over.
    """

    def __init__(
        self,
        segments: Tensor,
        cu_seqlens: Tensor,
        max_length: int | None = None,
        predicted: Predicted | None = None,
        varlen: VarlenKernels | None = None,
    ) -> None:
        """`segments` and `cu_seqlens`: as in a `pretrain.batching.batch.Microbatch`.

        max_length: of all sequences that `cu_seqlens` bounds, padding included; by default the width of a row. Flash
        attention does not compute the rest of a longer sequence, nor slots after the last bound.
        predicted: the slots that the last layer returns, if it is a short one (`shorten_last_layer`). None: all.
        varlen: as from `choose_varlen_kernels`.
        """
        self.predicted = predicted
        self.interrupts = False  # whether attention raises LayerInterrupted
        self.segments = segments
        self.cu_seqlens = cu_seqlens
        self.max_length = segments.shape[1] if max_length is None else max_length
        # Looked up here and not in each layer, which may be compiled.
        self.capability = device_capability(segments.device)
        self.varlen = varlen
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def prefers_varlen(self, sliding_window: int | None) -> bool:
        """Return whether there are kernels of our own, and they are faster than FlashAttention-2."""
        if self.varlen is None:
            return False
        anyway = _prefers_without_window(self.capability)
        if sliding_window is None:
            return anyway
        # `anyway` comes first: compiled layers that read the length may need a graph for each stage.
        if sliding_window - 1 <= _LOCAL_REACH:
            return anyway or self.max_length > 2 * sliding_window
        return anyway and self.max_length <= 2 * sliding_window

    def interrupting(self) -> Self:
        """Return a copy for a layer that is to run until it has computed its attention."""
        copied = copy.copy(self)
        copied.interrupts = True
        return copied

    def bias(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """Return [B, 1, W, W] to add to scores: 0, or the least number where a slot must not attend to another."""
        key = (sliding_window, dtype)
        if key not in self._biases:
            blocked = self._blocked(sliding_window)
            self._biases[key] = torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
        return self._biases[key]

    def _blocked(self, sliding_window: int | None) -> Tensor:
        """Return bool [B, 1, W, W]: True where a slot must not attend to another."""
        blocked = self.segments[:, None, :, None] != self.segments[:, None, None, :]
        if sliding_window is not None:
            slot = torch.arange(self.segments.shape[1], device=self.segments.device)
            blocked = blocked | ((slot[:, None] - slot[None, :]).abs() >= sliding_window)
        return blocked


@dataclass(frozen=True)
class PrecomputedAttention:
    """The output of attention that was computed before, in place of a Packing."""

    output: Tensor  # [1, M, H, D]


class LayerInterrupted(Exception):  # noqa: N818  # it is not an error
    """Ends the forward pass of a layer when its attention is computed. Its argument is the output of the attention for
    the predicted slots, [1, M, H, D]."""


def interruptible(attend: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Wrap `attend` for `pretrain.modeling.last_layer`, which runs a layer twice: the returned function raises
    LayerInterrupted in the first run, and returns the known output in the second. In the first run `attend` gets the
    option `predicted`, the slots whose output it has to return, [1, M, H, D]."""

    @functools.wraps(attend)
    def attention(*inputs: Any, packing: Packing | PrecomputedAttention | None = None, **options: Any) -> Any:
        if isinstance(packing, PrecomputedAttention):
            return packing.output, None
        if packing is None:
            raise TypeError("it does not pass 'packing' on to its attention")
        if not packing.interrupts:
            return attend(*inputs, packing=packing, **options)
        output_1MHD, _ = attend(*inputs, packing=packing, predicted=packing.predicted, **options)
        raise LayerInterrupted(output_1MHD)

    return attention


def use_packed_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(_PACKED, packed_attention)
    model.set_attn_implementation(_PACKED)


def uses_packed_attention(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == _PACKED)


def supports_flash(capability: Capability | None, head_size: int, dtype: torch.dtype) -> bool:
    """Return whether torch's FlashAttention-2 can train on a device of this capability (None: a CPU). These are the
    limits of torch's `sdp_utils.cpp` and `flash_api.cpp`."""
    if capability is None:
        return False
    small_shared_memory = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    return (
        (8, 0) <= capability <= (12, 1)
        and dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= (192 if small_shared_memory else 256)
    )


def uses_flash(config: PreTrainedConfig, capability: Capability | None, dtype: torch.dtype) -> bool:
    """Return whether flash attention computes the layers of a model on a device of this capability (None: a CPU)."""
    size = _head_size(config)
    return size is not None and supports_flash(capability, size, dtype)


def _head_size(config: PreTrainedConfig) -> int | None:
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not hidden or not heads:
        return None
    size: int = getattr(config, "head_dim", None) or hidden // heads
    return size


@functools.cache
def device_capability(device: torch.device) -> Capability | None:
    """Return the capability of a CUDA device; None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@interruptible
def packed_attention(
    module: nn.Module,
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    predicted: Predicted | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention output [B, W, H, D]. transformers dictates the signature.

    predicted: the slots whose output is returned, [1, M, H, D]; None: all.
    `sliding_window`: a slot attends to slots less than this many slots away, as in transformers' flash attention
    (ModernBERT: half its local window, plus one).
    """
    assert attention_mask is None, "transformers built a mask, which the packed attention does not use"
    head_size, dtype = query_BHWD.shape[-1], query_BHWD.dtype
    scaling = head_size**-0.5 if scaling is None else scaling
    if (group := query_BHWD.shape[1] // key_BHWD.shape[1]) > 1:  # grouped-query attention (Ainslie et al. 2023)
        key_BHWD, value_BHWD = (tensor.repeat_interleave(group, dim=1) for tensor in (key_BHWD, value_BHWD))
    inputs = (query_BHWD, key_BHWD, value_BHWD)
    if supports_flash(packing.capability, head_size, dtype):
        kernel = None
        if packing.varlen is not None and packing.prefers_varlen(sliding_window):
            kernel = packing.varlen.attend
        output_BWHD = flash_attention(*inputs, packing, scaling, dropout, sliding_window, kernel)
    elif packing.capability is not None:
        output_BWHD = masked_attention(*inputs, packing.bias(sliding_window, dtype), scaling, dropout)
    else:
        bias = packing.bias(sliding_window, dtype)
        if predicted is not None and predicted.by_row:
            return predicted_attention(*inputs, predicted, bias, scaling, dropout), None
        output_BWHD = matmul_attention(*inputs, bias, scaling, dropout)
    return output_BWHD if predicted is None else predicted.select(output_BWHD), None


@interruptible
def qkv_attention(
    qkv_BWJHD: Tensor,
    rotation: Rotation | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    predicted: Predicted | None = None,
) -> tuple[Tensor, None]:
    """Compute `packed_attention` for query, key and value in one tensor, by our own kernels: call it where the packing
    prefers them.

    rotation: of queries and keys, [B, W, D]; None: they have no rotary positions.
    """
    assert packing.varlen is not None
    if rotation is not None:
        cosines, sines = (tensor.flatten(0, 1) for tensor in rotation)
        rotation = cosines, sines
    output_THD = packing.varlen.attend_qkv(
        qkv_BWJHD.flatten(0, 1),
        rotation,
        packing.cu_seqlens,
        packing.max_length,
        scaling,
        dropout,
        _reach(sliding_window),
    )
    output_BWHD = output_THD.view(*packing.segments.shape, *output_THD.shape[1:])
    return output_BWHD if predicted is None else predicted.select(output_BWHD), None


def predicted_attention(
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    predicted: Predicted,
    bias: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Compute `matmul_attention` of predicted slots by row, [1, M, H, D]."""
    index = predicted.columns[:, None, :, None]
    query_BHQD = query_BHWD.gather(2, index.expand(-1, query_BHWD.shape[1], -1, query_BHWD.shape[3]))
    bias = bias.gather(2, index.expand(-1, -1, -1, bias.shape[3]))
    output_BQHD = matmul_attention(query_BHQD, key_BHWD, value_BHWD, bias, scaling, dropout)
    return output_BQHD.flatten(0, 1)[predicted.entries][None]


def matmul_attention(
    query_BHWD: Tensor, key_BHWD: Tensor, value_BHWD: Tensor, bias: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Compute attention by matrix products, [B, W, H, D]. `bias`: as from `Packing.bias`."""
    scores_BHWW = torch.matmul(query_BHWD * scaling, key_BHWD.transpose(-1, -2)).add_(bias)
    weights_BHWW = F.softmax(scores_BHWW, dim=-1)
    if dropout:
        weights_BHWW = fast_dropout(weights_BHWW, dropout)
    return torch.matmul(weights_BHWW, value_BHWD).transpose(1, 2)


def masked_attention(
    query_BHWD: Tensor, key_BHWD: Tensor, value_BHWD: Tensor, bias: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Compute [B, W, H, D]. `bias`: as from `Packing.bias`; torch would turn a boolean mask into one in each layer."""
    output = F.scaled_dot_product_attention(query_BHWD, key_BHWD, value_BHWD, bias, dropout, scale=scaling)
    return output.transpose(1, 2)


def flash_attention(
    query_BHWD: Tensor,
    key_BHWD: Tensor,
    value_BHWD: Tensor,
    packing: Packing,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    kernel: FlashKernel | None = None,
) -> Tensor:
    """Compute flash attention, [B, W, H, D]. kernel: None for FlashAttention-2."""
    query_THD, key_THD, value_THD = (
        tensor.transpose(1, 2).flatten(0, 1) for tensor in (query_BHWD, key_BHWD, value_BHWD)
    )
    options = (packing.cu_seqlens, packing.max_length, scaling, dropout, _reach(sliding_window))
    output_THD = (kernel or flash_attention_2)(query_THD, key_THD, value_THD, *options)
    return output_THD.view(*packing.segments.shape, *output_THD.shape[1:])


def _reach(sliding_window: int | None) -> int | None:
    """Return the slots on each side that a slot attends to, without the slot itself."""
    return None if sliding_window is None else sliding_window - 1


def flash_attention_2(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    """Compute [T, H, D]. Calls the operator of `torch.nn.attention.varlen`, whose function does not take a dropout."""
    output_THD, *_ = torch.ops.aten._flash_attention_forward(
        *(query_THD, key_THD, value_THD),
        *(cu_seqlens, cu_seqlens),
        *(max_length, max_length),
        dropout,
        False,  # not causal
        False,  # no mask for debugging
        scale=scaling,
        window_size_left=reach,
        window_size_right=reach,
    )
    assert isinstance(output_THD, Tensor)
    return output_THD


def _prefers_without_window(capability: Capability | None) -> bool:
    return capability is not None and capability[0] == HOPPER


def choose_varlen_kernels(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, has_windows: bool
) -> VarlenKernels | None:
    """Return our own kernels for packed sequences. None if flash attention does not compute the model on the device or
    is faster in all layers, or if Triton is missing or the kernels compute something else, of which there is one
    warning.

    has_windows: whether some layers of the model have a local window.
    """
    capability = device_capability(device)
    if _head_size(config) != _VARLEN_HEAD_SIZE or not uses_flash(config, capability, dtype):
        return None
    if not (has_windows or _prefers_without_window(capability)):
        return None
    return _tried_varlen_kernels(dtype, has_windows)


@functools.cache
def _tried_varlen_kernels(dtype: torch.dtype, has_windows: bool) -> VarlenKernels | None:
    try:
        from pretrain.modeling.varlen_attention import varlen_attention, varlen_qkv_attention

        kernels = VarlenKernels(varlen_attention, varlen_qkv_attention)
        with torch.inference_mode(mode=False), torch.enable_grad():  # a run may begin with an evaluation
            for reach in (None, _LOCAL_REACH) if has_windows else (None,):
                _compare_with_flash_attention(kernels, dtype, reach)
            _compare_dropped_weights(kernels, dtype)
    except Exception as error:  # of a missing package, compiler or driver
        log.warning("attention is that of torch; the kernels of deepcloze fail: %s", first_line(error))
        return None
    return kernels


def _compare_with_flash_attention(kernels: VarlenKernels, dtype: torch.dtype, reach: int | None) -> None:
    """Raise AssertionError if the kernels compute something else, or errors of Triton."""
    from pretrain.modeling.varlen_attention import apply_rotary

    qkv, bounds, longest = _trial(dtype)
    query, key, value = qkv.unbind(1)
    frequencies = torch.linspace(1, 0, qkv.shape[-1] // 2, device="cuda").repeat(2)
    angles = torch.arange(len(qkv), device="cuda")[:, None] * frequencies
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    options = (bounds, longest, 0.1, 0.0, reach)
    outputs = kernels.attend(query, key, value, *options), kernels.attend_qkv(qkv, rotation, *options)
    expected = (
        flash_attention_2(query, key, value, *options),
        flash_attention_2(apply_rotary(query, *rotation), apply_rotary(key, *rotation), value, *options),
    )
    for pair in zip(outputs, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=2e-2, atol=2e-2)
        gradients = [torch.autograd.grad(output, qkv, pair[1].detach())[0] for output in pair]
        torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


def _compare_dropped_weights(kernels: VarlenKernels, dtype: torch.dtype) -> None:
    """Raise AssertionError if the kernels drop another share, or other weights in the backward pass than in the
    forward pass, or errors of Triton.

    For given dropped weights the output is linear in the values. Therefore its dot product with its gradient equals
    the values' dot product with theirs. Scores are small, so that the output depends mostly on the dropped weights.
    """
    qkv, bounds, longest = _trial(dtype)
    options = (bounds, longest, 0.01, 0.25, None)
    state = torch.cuda.get_rng_state()
    try:
        output = kernels.attend_qkv(qkv, None, *options)
        query, key, value = qkv.detach().unbind(1)
        mean = kernels.attend(query, key, torch.ones_like(value), *options).float().mean()
    finally:
        torch.cuda.set_rng_state(state)
    upstream = output.detach()
    (gradient,) = torch.autograd.grad(output, qkv, upstream)
    output_product = upstream.float().square().sum()
    value_product = (value.float() * gradient[:, 2].float()).sum()
    torch.testing.assert_close(value_product, output_product, rtol=5e-2, atol=0.0)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=5e-2, atol=0.0)


def _trial(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Query, key and value in one tensor, [200, 3, H, D], the bounds of its two sequences, and the longer length. The
    numbers are not random, because that would change the masks of dropout."""
    numbers = torch.arange(3 * 200 * 2 * _VARLEN_HEAD_SIZE, device="cuda").sin()
    qkv = numbers.view(3, 200, 2, _VARLEN_HEAD_SIZE).transpose(0, 1).to(dtype).requires_grad_()
    return qkv, torch.tensor([0, 90, 200], dtype=torch.int32, device="cuda"), 110
