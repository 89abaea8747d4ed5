"""Kernels of a training step alone, forward and backward: a step of `benchmarks.gpu_session`.

    python -m benchmarks.gpu_kernels bf16

Prints a `KernelTime` after each kernel, also if it fails. CUDA events measure the times, of several calls at once: the
GPU waits for the host in the first one only.
"""

import argparse
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
from experiment.errors import first_line
from pretrain.batching.batch import IGNORED
from pretrain.modeling.attention import (
    FlashKernel,
    Packing,
    flash_attention,
    flash_attention_2,
    masked_attention,
    matmul_attention,
    supports_flash,
)
from pretrain.modeling.fused_cross_entropy import linear_cross_entropy
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


_Call = tuple[Sequence[Tensor], Callable[[], Tensor]]
"""The inputs for which gradients are computed, and the forward pass."""


@dataclass(frozen=True)
class _Kernel:
    name: str
    shape: str
    prepare: Callable[[], _Call]  # imports the kernel, and draws its inputs
    flops: float | None = None  # of forward and backward


def run(settings: KernelSettings) -> Iterator[KernelTime]:
    """Measure each kernel."""
    for kernel in _kernels(settings):
        yield _measure(kernel, settings)


def _measure(kernel: _Kernel, settings: KernelSettings) -> KernelTime:
    try:
        ms = _milliseconds(kernel, settings)
    except Exception as error:  # the others may still work
        return KernelTime(kernel.name, settings.precision, kernel.shape, error=first_line(error))
    rate = None if kernel.flops is None else kernel.flops / ms / 1e9
    return KernelTime(kernel.name, settings.precision, kernel.shape, ms, rate)


def _kernels(settings: KernelSettings) -> Iterator[_Kernel]:
    for length in settings.lengths:
        yield from _attention(settings, length)
    yield from _flash(settings, settings.lengths[-1], _WINDOW)
    for vocabulary in settings.vocabularies:
        yield from _heads(settings, vocabulary)
    yield from _layers(settings)


def _attention(settings: KernelSettings, length: int) -> Iterator[_Kernel]:
    yield from _flash(settings, length)
    flops = _attention_flops(settings.tokens, length)
    for dropout in (0.0, 0.1):
        prepare = partial(_prepare_masked, settings, length, dropout)
        yield _Kernel(f"attention with a mask, dropout {dropout:g}", _attention_shape(settings, length), prepare, flops)


def _prepare_masked(settings: KernelSettings, length: int, dropout: float) -> _Call:
    query, key, value, packing = _draw_attention(settings, length)
    with_mask = masked_attention if settings.device == "cuda" else matmul_attention
    bias = packing.bias(None, DTYPES[settings.precision])
    return (query, key, value), partial(with_mask, query, key, value, bias, _SIZE**-0.5, dropout)


def _flash(settings: KernelSettings, length: int, window: int | None = None) -> Iterator[_Kernel]:
    dtype = DTYPES[settings.precision]
    if settings.device != "cuda" or not supports_flash(torch.cuda.get_device_capability(), _SIZE, dtype):
        return
    flops = _attention_flops(settings.tokens, length) if window is None else None
    for name, ours in (("FlashAttention-2", False), ("our flash attention", True)):
        for dropout in (0.0, 0.1):
            prepare = partial(_prepare_flash, settings, length, window, dropout, ours)
            full_name = f"{name}, dropout {dropout:g}" + ("" if window is None else f", window {window}")
            yield _Kernel(full_name, _attention_shape(settings, length), prepare, flops)


def _prepare_flash(settings: KernelSettings, length: int, window: int | None, dropout: float, ours: bool) -> _Call:
    kernel: FlashKernel = flash_attention_2
    if ours:
        from pretrain.modeling.varlen_attention import varlen_attention

        kernel = varlen_attention
    query, key, value, packing = _draw_attention(settings, length)
    call = partial(flash_attention, query, key, value, packing, _SIZE**-0.5, dropout, window, kernel)
    return (query, key, value), call


def _draw_attention(settings: KernelSettings, length: int) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """Query, key and value, and rows of one sequence each."""
    rows = _rows(settings, length)
    query, key, value = (_draw(settings, rows, length, _HEADS, _SIZE).transpose(1, 2) for _ in range(3))
    numbers = torch.arange(1, rows + 1, dtype=torch.int32, device=settings.device)
    bounds = torch.arange(0, rows + 1, dtype=torch.int32, device=settings.device) * length
    return query, key, value, Packing(numbers[:, None].expand(rows, length), bounds)


def _rows(settings: KernelSettings, length: int) -> int:
    return max(1, settings.tokens // length)


def _attention_shape(settings: KernelSettings, length: int) -> str:
    return _describe(_rows(settings, length), _HEADS, length, _SIZE)


def _attention_flops(tokens: int, length: int) -> float:
    """Two products forward, four backward. Recomputed scores do not count."""
    return 6 * 2.0 * tokens * length * _HEADS * _SIZE


def _heads(settings: KernelSettings, vocabulary: int) -> Iterator[_Kernel]:
    predicted = max(1, round(_PREDICTED * settings.tokens))
    shape, flops = f"{predicted} x {_HIDDEN} x {vocabulary}", 6.0 * predicted * _HIDDEN * vocabulary
    for fused in (False, True) if settings.device == "cuda" else (False,):  # its Triton kernel does not run on a CPU
        name = "head, fused" if fused else "head, logits kept"
        yield _Kernel(name, shape, partial(_prepare_head, settings, predicted, vocabulary, fused), flops)


def _prepare_head(settings: KernelSettings, predicted: int, vocabulary: int, fused: bool) -> _Call:
    labels = torch.arange(predicted, device=settings.device) % vocabulary
    labels[::50] = IGNORED
    loss = partial(_fused_loss if fused else _plain_loss, labels)
    return _prepare(settings, loss, ((predicted, _HIDDEN), (vocabulary, _HIDDEN), (vocabulary,)))


def _plain_loss(labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    loss_sum, _ = cross_entropy(F.linear(hidden, weight, bias), labels, count=False)
    return loss_sum


def _fused_loss(labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, labels).loss_sum


def _layers(settings: KernelSettings) -> Iterator[_Kernel]:
    narrow, wide = (settings.tokens, _HIDDEN), (settings.tokens, 4 * _HIDDEN)
    memory_bound: tuple[tuple[str, Callable[..., Tensor], tuple[tuple[int, ...], ...]], ...] = (
        ("dropout", lambda values: F.dropout(values, 0.1), (narrow,)),
        ("layer norm", lambda values, scale: F.layer_norm(values, (_HIDDEN,), scale), (narrow, (_HIDDEN,))),
        ("GELU", F.gelu, (wide,)),
    )
    for name, call, shapes in memory_bound:
        yield _Kernel(name, _describe(*shapes[0]), partial(_prepare, settings, call, shapes))
    linear = partial(_prepare, settings, F.linear, (narrow, (4 * _HIDDEN, _HIDDEN), (4 * _HIDDEN,)))
    yield _Kernel(
        "linear layer", _describe(*narrow, 4 * _HIDDEN), linear, 6.0 * settings.tokens * _HIDDEN * 4 * _HIDDEN
    )


def _prepare(settings: KernelSettings, call: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]) -> _Call:
    inputs = [_draw(settings, *shape) for shape in shapes]
    return inputs, partial(call, *inputs)


def _draw(settings: KernelSettings, *shape: int) -> Tensor:
    return torch.randn(shape, device=settings.device, dtype=DTYPES[settings.precision]).requires_grad_()


def _describe(*sizes: int) -> str:
    return " x ".join(map(str, sizes))


def _milliseconds(kernel: _Kernel, settings: KernelSettings) -> float:
    """Median time of a forward and a backward pass."""
    inputs, call = kernel.prepare()
    upstream = torch.ones_like(call())

    def compute() -> None:
        torch.autograd.grad(call(), inputs, upstream)

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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("precision", choices=DTYPES)
    results = []
    for result in run(KernelSettings("cuda", parser.parse_args(argv).precision)):
        results.append(result)
        print_figures(asdict(result))
    if any(result.error and "out of memory" not in result.error for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
