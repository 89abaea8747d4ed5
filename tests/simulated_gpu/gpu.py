"""Simulate a GPU in this process."""

import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

from simulated_gpu import kernels
from simulated_gpu.kernels import cross_entropy_kernel, register_kernels
from simulated_gpu.memory import Memory
from simulated_gpu.operators import Device, Operators
from simulated_gpu.tensor_methods import tensor_methods
from simulated_gpu.timeline import COLLECTIVES, Event, Stream, Timeline

_CAPABILITY = (9, 0)
_BYTES = 80 << 30
_NAME = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class SimulatedGpu:
    """What code does that runs on it."""

    device: Device
    calls: Counter[str]  # of the kernels in `simulated_gpu.kernels`

    @property
    def mixed(self) -> list[str]:
        return self.device.mixed

    @property
    def waits(self) -> list[str]:
        return self.device.timeline.waits

    @property
    def races(self) -> list[str]:
        return self.device.timeline.races


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """torch and DeepSpeed find a GPU, in this thread and in those that it starts. Tensors of before are on the CPU."""
    gpu = SimulatedGpu(Device(Memory(), Timeline()), Counter())
    index = int(os.environ.get("LOCAL_RANK", "0"))
    _device_constructors()  # cached; filled below, it would hold the patched functions in place of torch's own
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        register_kernels(library, gpu.calls)
        for name, value in tensor_methods(gpu.device, index).items():
            patch.setattr(torch.Tensor, name, value)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, functools.partial(_create_and_move, getattr(torch, name)))
        for name, value in _cuda_functions(gpu.device.timeline, index).items():
            patch.setattr(torch.cuda, name, value)
        _patch_collectives(patch, gpu.device.timeline)
        _patch_threads(patch, gpu.device)
        _patch_triton(patch, gpu)
        _patch_functions_in_cpp(patch)
        _patch_deepspeed(patch)
        with Operators(gpu.device):
            yield gpu


def _create_and_move(create: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which would ask for the device itself."""
    created: torch.Tensor = create(*args, **options)
    return created if device is None else created.to(device)


def _cuda_functions(timeline: Timeline, index: int) -> dict[str, Any]:
    """Of `torch.cuda`."""

    def constant(value: Any) -> Any:
        return lambda *_, **__: value

    properties = SimpleNamespace(
        name=_NAME, major=_CAPABILITY[0], minor=_CAPABILITY[1], total_memory=_BYTES, multi_processor_count=132
    )
    return {
        "_lazy_init": constant(None),
        "is_available": constant(True),
        "is_initialized": constant(True),
        "is_bf16_supported": constant(True),
        "is_current_stream_capturing": constant(False),
        "device_count": constant(int(os.environ.get("LOCAL_SIZE", "1"))),
        "current_device": constant(index),
        "set_device": constant(None),
        "device": constant(contextlib.nullcontext()),
        "get_device_name": constant(_NAME),
        "get_device_capability": constant(_CAPABILITY),
        "get_device_properties": constant(properties),
        "Stream": functools.partial(Stream, timeline),
        "Event": functools.partial(Event, timeline),
        "stream": timeline.on,
        "current_stream": lambda *_: timeline.current_stream,
        "default_stream": constant(timeline.default_stream),
        "synchronize": timeline.synchronize,
        # The CPU's generator is the GPU's, too.
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": constant(None),
        "manual_seed_all": constant(None),
        "empty_cache": constant(None),
        "reset_peak_memory_stats": constant(None),
        "memory_stats": constant({}),
        "mem_get_info": constant((_BYTES, _BYTES)),
    } | dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), constant(0)
    )


def _patch_collectives(patch: pytest.MonkeyPatch, timeline: Timeline) -> None:
    wait = dist.Work.wait

    def wait_on_stream(work: Any, *args: Any) -> Any:
        timeline.wait(timeline.current_stream.name, timeline.snapshot(COLLECTIVES))
        with _disable_current_modes():  # gloo copies results
            return wait(work, *args)

    patch.setattr(dist.Work, "wait", wait_on_stream)


def _patch_threads(patch: pytest.MonkeyPatch, device: Device) -> None:
    run = threading.Thread.run

    def run_with_operators(thread: threading.Thread) -> None:
        with Operators(device):
            run(thread)

    patch.setattr(threading.Thread, "run", run_with_operators)


def _patch_triton(patch: pytest.MonkeyPatch, gpu: SimulatedGpu) -> None:
    """A kernel is one operator, which reads and writes all tensors that it gets."""
    from pretrain.modeling import attention, varlen_attention  # imports Triton

    class Launcher:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return launch

    def launch(*args: Any, **options: Any) -> None:
        gpu.calls["cross_entropy_kernel"] += 1
        gpu.device.launch_kernel("cross_entropy_kernel", [value for value in args if isinstance(value, torch.Tensor)])
        with _disable_current_modes():
            cross_entropy_kernel(*args, **options)

    def varlen(*args: Any) -> torch.Tensor:
        gpu.calls["varlen_attention"] += 1
        return kernels.varlen_attention(*args)

    def qkv(*args: Any) -> torch.Tensor:
        gpu.calls["varlen_attention"] += 1
        return kernels.varlen_qkv_attention(*args)

    patch.setattr("pretrain.modeling.cross_entropy_kernel._cross_entropy_kernel", Launcher())
    patch.setattr(varlen_attention, "varlen_attention", varlen)
    patch.setattr(varlen_attention, "varlen_qkv_attention", qkv)
    attention._tried_varlen_kernels.cache_clear()


def _patch_functions_in_cpp(patch: pytest.MonkeyPatch) -> None:
    """Functions of torch's that ask for the device themselves, in C++."""
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def group_tensors(lists: Any, with_indices: bool = False) -> Any:
        return {(found[0][0][0].device, dtype): found for (_, dtype), found in group(lists, with_indices).items()}

    patch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(group_tensors))
    # torch 2.14 and later; earlier versions ask `torch.cuda`.
    patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)

    def pad_sequence(sequences: Any, batch_first: bool, padding_value: float, _side: str) -> torch.Tensor:
        assert batch_first
        padded = sequences[0].new_full((len(sequences), max(map(len, sequences))), padding_value)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = sequence
        return padded

    patch.setattr(torch._C._nn, "pad_sequence", pad_sequence)


def _patch_deepspeed(patch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    accelerator = CUDA_Accelerator()
    accelerator._communication_backend_name = "gloo"
    patch.setattr(real_accelerator, "ds_accelerator", accelerator)
    patch.setattr(torch.cuda, "nvtx", SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None))
    # It would import torch's inductor, for DeepCompile, which is not used.
    patch.setattr("deepspeed.runtime.engine.is_deepcompile_supported", lambda: False)
