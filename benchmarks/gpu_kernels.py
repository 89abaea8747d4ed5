"""Kernels of a training step alone, forward and backward: a step of `benchmarks.gpu_session`.

    python -m benchmarks.gpu_kernels bf16

Prints a `KernelTime` after each kernel. CUDA events measure the times, of several calls at once: the GPU waits for the
host in the first one only.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_results import print_figures
from pretrain.batching.batch import IGNORED
from pretrain.modeling.attention import (
    Packing,
    flash_attention,
    flash_attention_2,
    masked_attention,
    matmul_attention,
    supports_flash,
)
from pretrain.modeling.head import cross_entropy

_HEADS, _SIZE, _HIDDEN = 12, 64, 768
_PREDICTED = 0.15
_WINDOW = 65  # of ModernBERT's layers with a local window: 64 slots on each side
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_WARM = 3
_CALLS = 10  # between two CUDA events


@dataclass(frozen=True)
class KernelSettings:
    device: str  # cuda or cpu
    precision: str
    lengths: tuple[int, ...] = (128, 512, 1024)  # of the sequences in attention
    tokens: int = 65_536  # of a microbatch
    rounds: int = 5
    vocabularies: tuple[int, ...] = (30522, 50368)  # of BERT and ModernBERT


@dataclass(frozen=True)
class KernelTime:
    kernel: str
    precision: str
    shape: str
    ms: float | None = None  # forward and backward, median of the rounds
    tflops: float | None = None  # TFLOP/s; None: it is bound by memory
    error: str = ""  # why nothing was measured


@dataclass(frozen=True)
class _Kernel:
    name: str
    shape: str
    inputs: Sequence[Tensor]  # gradients are computed for these
    call: Callable[[], Tensor]
    flops: float | None = None  # of forward and backward


def run(settings: KernelSettings) -> Iterator[KernelTime]:
    """Measure each kernel."""
    for kernel in _kernels(settings):
        yield _measure(kernel, settings)


def _measure(kernel: _Kernel, settings: KernelSettings) -> KernelTime:
    try:
        ms = _milliseconds(kernel, settings)
    except torch.cuda.OutOfMemoryError:
        return KernelTime(kernel.name, settings.precision, kernel.shape, error="out of memory")
    rate = None if kernel.flops is None else kernel.flops / ms / 1e9
    return KernelTime(kernel.name, settings.precision, kernel.shape, ms, rate)


def _kernels(settings: KernelSettings) -> Iterator[_Kernel]:
    """One after the other, because they take much memory."""
    for length in settings.lengths:
        yield from _attention(settings, length)
    yield from _flash(settings, settings.lengths[-1], _WINDOW)
    for vocabulary in settings.vocabularies:
        yield from _heads(settings, vocabulary)
    yield from _layers(settings)


def _attention(settings: KernelSettings, length: int) -> Iterator[_Kernel]:
    yield from _flash(settings, length)
    query, key, value, packing = _draw_attention(settings, length)
    with_mask = masked_attention if settings.device == "cuda" else matmul_attention
    bias = packing.bias(None, DTYPES[settings.precision])
    for dropout in (0.0, 0.1):
        call = partial(with_mask, query, key, value, bias, _SIZE**-0.5, dropout)
        name = f"attention with a mask, dropout {dropout:g}"
        yield _Kernel(name, _describe(query), (query, key, value), call, _attention_flops(settings.tokens, length))


def _flash(settings: KernelSettings, length: int, window: int | None = None) -> Iterator[_Kernel]:
    dtype = DTYPES[settings.precision]
    if settings.device != "cuda" or not supports_flash(torch.cuda.get_device_capability(), _SIZE, dtype):
        return
    from pretrain.modeling.varlen_attention import varlen_attention

    query, key, value, packing = _draw_attention(settings, length)
    flops = _attention_flops(settings.tokens, length) if window is None else None
    for name, kernel in (("FlashAttention-2", flash_attention_2), ("our flash attention", varlen_attention)):
        for dropout in (0.0, 0.1):
            call = partial(flash_attention, query, key, value, packing, _SIZE**-0.5, dropout, window, kernel)
            full_name = f"{name}, dropout {dropout:g}" + ("" if window is None else f", window {window}")
            yield _Kernel(full_name, _describe(query), (query, key, value), call, flops)


def _draw_attention(settings: KernelSettings, length: int) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """Query, key and value, and rows of one sequence each."""
    rows = max(1, settings.tokens // length)
    query, key, value = (_draw(settings, rows, length, _HEADS, _SIZE).transpose(1, 2) for _ in range(3))
    numbers = torch.arange(1, rows + 1, dtype=torch.int32, device=settings.device)
    bounds = torch.arange(0, rows + 1, dtype=torch.int32, device=settings.device) * length
    return query, key, value, Packing(numbers[:, None].expand(rows, length), bounds)


def _attention_flops(tokens: int, length: int) -> float:
    """Two products forward, four backward. Recomputed scores do not count."""
    return 6 * 2.0 * tokens * length * _HEADS * _SIZE


def _heads(settings: KernelSettings, vocabulary: int) -> Iterator[_Kernel]:
    predicted = max(1, round(_PREDICTED * settings.tokens))
    shapes = ((predicted, _HIDDEN), (vocabulary, _HIDDEN), (vocabulary,))
    hidden, weight, bias = inputs = [_draw(settings, *shape) for shape in shapes]
    labels = torch.arange(predicted, device=settings.device) % vocabulary
    labels[::50] = IGNORED
    shape, flops = f"{predicted} x {_HIDDEN} x {vocabulary}", 6.0 * predicted * _HIDDEN * vocabulary
    yield _Kernel("head, logits kept", shape, inputs, partial(_plain_loss, hidden, weight, bias, labels), flops)
    if settings.device == "cuda":  # its Triton kernel does not run on a CPU
        from pretrain.modeling.fused_cross_entropy import linear_cross_entropy

        fused = partial(linear_cross_entropy, hidden, weight, bias, labels)
        yield _Kernel("head, fused", shape, inputs, lambda: fused().loss_sum, flops)


def _plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    loss_sum, _ = cross_entropy(F.linear(hidden, weight, bias), labels, count=False)
    return loss_sum


def _layers(settings: KernelSettings) -> Iterator[_Kernel]:
    values, wide = _draw(settings, settings.tokens, _HIDDEN), _draw(settings, settings.tokens, 4 * _HIDDEN)
    weight, bias, scale = (_draw(settings, *shape) for shape in ((4 * _HIDDEN, _HIDDEN), (4 * _HIDDEN,), (_HIDDEN,)))
    norm = partial(F.layer_norm, values, (_HIDDEN,), scale)
    yield _Kernel("dropout", _describe(values), [values], partial(F.dropout, values, 0.1))
    yield _Kernel("layer norm", _describe(values), [values, scale], norm)
    yield _Kernel("GELU", _describe(wide), [wide], partial(F.gelu, wide))
    flops = 6.0 * settings.tokens * weight.numel()
    linear = partial(F.linear, values, weight, bias)
    yield _Kernel("linear layer", f"{_describe(values)} x {4 * _HIDDEN}", [values, weight, bias], linear, flops)


def _draw(settings: KernelSettings, *shape: int) -> Tensor:
    return torch.randn(shape, device=settings.device, dtype=DTYPES[settings.precision]).requires_grad_()


def _describe(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape)


def _milliseconds(kernel: _Kernel, settings: KernelSettings) -> float:
    """Median time of a forward and a backward pass."""
    upstream = torch.ones_like(kernel.call())

    def compute() -> None:
        torch.autograd.grad(kernel.call(), kernel.inputs, upstream)

    for _ in range(_WARM):
        compute()
    time_once = _time_on_gpu if settings.device == "cuda" else _time_on_cpu
    return statistics.median(time_once(compute) for _ in range(settings.rounds))


def _time_on_gpu(compute: Callable[[], None]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        compute()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _CALLS


def _time_on_cpu(compute: Callable[[], None]) -> float:
    start = time.perf_counter()
    compute()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    for result in run(KernelSettings("cuda", sys.argv[1])):
        print_figures(asdict(result))
