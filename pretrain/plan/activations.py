"""The memory of one microbatch, found by running it on torch's meta device, where tensors have shapes but no data.

The model's own forward and backward run, so that the figures hold for every architecture that transformers has.
`Allocations` sees each operator's results and when they are freed. Memory that a kernel allocates and frees inside one
operator is not seen.

On a GPU other kernels run than on a CPU. `_use_gpu_kernels` replaces the two that keep other tensors for the backward
pass: dropout, whose mask takes one byte per element there, and attention, which keeps no scores (Dao et al. 2022,
arXiv:2205.14135; scaled_dot_product_attention and torch.nn.attention.varlen keep the same).
Layers are not compiled: on a GPU, compiled ones keep about as much.
"""

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from pretrain.batching.batch import Microbatch
from pretrain.batching.packing import RowKind
from pretrain.modeling.attention import Predicted, interruptible, use_packed_attention, uses_packed_attention
from pretrain.modeling.build import checkpoint_activations
from pretrain.modeling.fused_cross_entropy import chunk_rows, padded_columns
from pretrain.modeling.head import choose_fused_head, gpu_losses
from pretrain.modeling.masked_lm import MaskedLanguageModel

_GPU_ATTENTION = "deepcloze_planned"


@dataclass(frozen=True)
class MicrobatchShape:
    """The largest microbatch of a rank."""

    rows: int
    width: int
    predicted: int  # masked positions, padding included
    sequences: int


@dataclass(frozen=True)
class MicrobatchMemory:
    """Bytes at the moment of the highest use in the forward and backward pass of one microbatch."""

    activations: int
    logits: int  # on a GPU a chunk of them, on a CPU all; with a head that is not fused log-softmax and gradients too
    gradients: int  # in `parameter.grad`; 0 where they go to a buffer of DeepSpeed as soon as they are computed

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradients


@dataclass(frozen=True)
class Computation:
    dtype: torch.dtype  # of weights and activations
    kind: RowKind  # of rows
    on_gpu: bool
    checkpointed: bool  # model.activation_checkpointing
    gradients_stay: bool = False  # in `parameter.grad` until the step
    accumulates: bool = False  # a step has several microbatches


def microbatch_memory(model: PreTrainedModel, shape: MicrobatchShape, computation: Computation) -> MicrobatchMemory:
    """Measure memory. `model`: on the meta device; changed. Raises RuntimeError or AssertionError if it cannot run."""
    with _UnknownValues(), torch.device("meta"):  # type: ignore[no-untyped-call]
        wrapped = _prepare(model, computation)
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.to(computation.dtype)
            if parameter.requires_grad and not computation.gradients_stay:
                parameter.register_post_accumulate_grad_hook(_move_gradient)  # type: ignore[no-untyped-call]
            if computation.accumulates and computation.gradients_stay:
                parameter.grad = torch.empty_like(parameter)
        microbatch = _meta_microbatch(shape)
        vocabulary = model.config.get_text_config().vocab_size
        chunk = min(shape.predicted, chunk_rows(vocabulary)) * padded_columns(vocabulary)
        allocations = Allocations(wrapped, {shape.predicted * vocabulary, chunk if computation.on_gpu else 0})
        with allocations:
            wrapped(*microbatch).loss_sum.mul(torch.ones(())).backward()
    return allocations.peak


def _move_gradient(parameter: Tensor) -> None:
    """Copy a complete gradient in fp32 to a buffer, as DeepSpeed does."""
    assert parameter.grad is not None
    parameter.grad.to(torch.float32)
    parameter.grad = None


def _prepare(model: PreTrainedModel, computation: Computation) -> MaskedLanguageModel:
    if computation.kind != "padded":
        use_packed_attention(model)
    head = choose_fused_head(model, gpu_losses if computation.on_gpu else None)
    wrapped = MaskedLanguageModel(model, head=head).train()
    if computation.on_gpu:
        _use_gpu_kernels(model)
    if computation.kind == "flat":
        wrapped.windows = set()  # flash attention needs no masks, which have an entry for each pair of slots
    if computation.checkpointed:
        # The meta device has no generator; its state takes no memory worth counting.
        checkpoint_activations(model, preserve_rng_state=False)
    return wrapped


def _meta_microbatch(shape: MicrobatchShape) -> Microbatch:
    slots = (shape.rows, shape.width)
    fullest = -(-3 * shape.predicted // (2 * shape.rows))  # assumed: the fullest row has half more than the mean
    columns = min(shape.width, fullest)
    return Microbatch(
        input_ids=torch.empty(slots, dtype=torch.int64),
        position_ids=torch.empty(slots, dtype=torch.int64),
        segments=torch.empty(slots, dtype=torch.int32),
        cu_seqlens=torch.empty(shape.sequences + 1, dtype=torch.int32),
        masked_positions=torch.empty(shape.predicted, dtype=torch.int64),
        labels=torch.empty(shape.predicted, dtype=torch.int64),
        predicted_columns=torch.empty(shape.rows, columns, dtype=torch.int64),
        predicted_entries=torch.empty(shape.predicted, dtype=torch.int64),
    )


class _UnknownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers False or 0 if a model reads a value of a tensor, such as whether a mask hides nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that are alive, except the weights, and keeps the sums at their highest total."""

    def __init__(self, model: nn.Module, logits: Collection[int]) -> None:
        """`logits`: the numbers of elements that make a tensor count as logits."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._logits = logits
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, tuple[int, str]] = {}  # storage -> bytes, content
        self._bytes = {"activations": 0, "logits": 0, "gradients": 0}
        self.peak = MicrobatchMemory(**self._bytes)
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._add(parameter.grad, "gradients")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count_as_gradient)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result, "logits" if result.numel() in self._logits else "activations")
        if sum(self._bytes.values()) > self.peak.total:
            self.peak = MicrobatchMemory(**self._bytes)
        return results

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._alive:
            return
        self._alive[key] = (size, kind)
        self._bytes[kind] += size
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size, kind = self._alive.pop(key)
        self._bytes[kind] -= size

    def _count_as_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata
            size, kind = self._alive[key]
            self._alive[key] = (size, "gradients")
            self._bytes[kind] -= size
            self._bytes["gradients"] += size


def _use_gpu_kernels(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = _GpuDropout
    if model.config._attn_implementation != "eager":
        attend = interruptible(_gpu_attention) if uses_packed_attention(model) else _gpu_attention
        AttentionInterface.register(_GPU_ATTENTION, attend)
        model.set_attn_implementation(_GPU_ATTENTION)


class _GpuDropout(nn.Dropout):
    def forward(self, values: Tensor) -> Tensor:
        return torch.native_dropout(values, self.p, True)[0] if self.training and self.p > 0 else values


def _gpu_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    predicted: Predicted | None = None,
    **__: Any,
) -> Any:
    """Return the attention output [B, W, H, D] of query, key and value [B, H, W, D], or a selection of it."""
    output = _GpuAttention.apply(query, key, value).transpose(1, 2)  # type: ignore[no-untyped-call]
    return output if predicted is None else predicted.select(output), None


class _GpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
