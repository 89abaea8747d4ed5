"""Measure throughput and memory of training; look up the peak FLOP/s of devices."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Lap:
    """Throughput of one logging interval."""

    seconds: float
    tokens_per_second: float
    data_wait: float  # fraction of the interval spent waiting for data


class Throughput:
    """Counts tokens and waiting time between calls of `lap`. clock: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._tokens = 0
        self._waited = 0.0

    def add(self, tokens: int) -> None:
        """Count tokens trained on, without padding."""
        self._tokens += tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside, which is not spent on training."""
        started = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - started

    def lap(self) -> Lap:
        """The throughput since the last call. Starts the next interval."""
        now = self._clock()
        seconds = max(now - self._started, 1e-9)
        lap = Lap(seconds, self._tokens / seconds, min(self._waited / seconds, 1.0))
        self._started, self._tokens, self._waited = now, 0, 0.0
        return lap


def peak_memory() -> int:
    """Peak memory of this process in bytes: allocated CUDA memory or, without CUDA, resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device for dense matrices; None if unknown, as for every CPU.

    device_name: as from `torch.cuda.get_device_name`. precision: fp16 or bf16 (tensor cores, fp32 accumulation), or
    fp32 (no tensor cores).
    """
    if "MIG" in device_name:
        return None  # a part of a device
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device_name):
            peak = peaks.get(precision)
            return None if peak is None else peak * 1e12
    return None


# TFLOP/s without sparsity. The first pattern found in the name applies.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Tesla V100 GPU accelerator, data sheet, January 2020 (the V100S in the 2019 one)
    (r"\bV100S", {"fp16": 130.0, "fp32": 16.4}),
    (r"\bV100-PCIE", {"fp16": 112.0, "fp32": 14.0}),
    (r"\bV100", {"fp16": 125.0, "fp32": 15.7}),
    # NVIDIA A100 Tensor Core GPU, data sheet, June 2021
    (r"\bA100\b", {"fp16": 312.0, "bf16": 312.0, "fp32": 19.5}),
    # NVIDIA H100 Tensor Core GPU, data sheet: half of the figures with sparsity
    (r"\bH100 PCIe", {"fp16": 756.5, "bf16": 756.5, "fp32": 51.0}),
    (r"\bH100 NVL", {"fp16": 835.5, "bf16": 835.5, "fp32": 60.0}),
    (r"\bH100\b", {"fp16": 989.5, "bf16": 989.5, "fp32": 67.0}),
    # NVIDIA H200 Tensor Core GPU, data sheet: half of the figures with sparsity
    (r"\bH200 NVL", {"fp16": 835.5, "bf16": 835.5, "fp32": 60.0}),
    (r"\bH200\b", {"fp16": 989.5, "bf16": 989.5, "fp32": 67.0}),
    # NVIDIA L40S, data sheet
    (r"\bL40S\b", {"fp16": 362.05, "bf16": 362.05, "fp32": 91.6}),
    # NVIDIA A10 Tensor Core GPU, data sheet
    (r"\bA10\b", {"fp16": 125.0, "bf16": 125.0, "fp32": 31.2}),
    # NVIDIA Ada GPU architecture, white paper, appendix A
    (r"\bRTX 4090(?! D| Laptop)", {"fp16": 165.2, "bf16": 165.2, "fp32": 82.6}),
    # AMD Instinct MI300X accelerator, data sheet
    (r"\bMI300X\b", {"fp16": 1307.4, "bf16": 1307.4, "fp32": 163.4}),
)
