"""Where the host reads values of tensors during a training step, which would make it wait for a GPU.

`tests/gpu/test_gpu_syncs.py` asks CUDA. Here the reads are recorded on a CPU, where they cost nothing.
"""

import itertools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from experiment.models import fast_linear
from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, build_engine, microbatch, run_config, sampled

WARMUP = 2  # steps; in the first ones DeepSpeed's ZeRO 3 compares the order of parameters between ranks

DS_CONFIGS = [
    "fp32_zero0",
    *(f"{precision}_zero{stage}" for precision in ("fp32", "bf16", "fp16") for stage in (1, 2, 3)),
]

_aten = torch.ops.aten
_READ_BY_OPERATOR = {  # scalars, such as item(), float() and bool(), and sizes that depend on values
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
}
_READ_BY_METHOD = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}  # which torch does not dispatch on a CPU


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ_BY_OPERATOR or (func is _aten.index.Tensor and _selects(args[1])):
            self._reads.append(_caller())
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ_BY_METHOD:
            self._reads.append(_caller())
        return func(*args, **(kwargs or {}))


def _selects(indices: list[Tensor | None]) -> bool:
    """Whether a boolean index selects an unknown number of elements."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _caller() -> str:
    """The innermost line that is neither torch's nor this file's."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = [frame for frame in frames if frame.filename != __file__][-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


@contextmanager
def recorded_reads() -> Iterator[list[str]]:
    """Where the host reads values, one entry per read."""
    reads: list[str] = []
    with _Methods(reads), _Operators(reads):
        yield reads


def reads_case(world: World, tree: Tree) -> tuple[list[str], list[list[str]]]:
    """The reads in all microbatches of some steps, and in the rest of each of these steps."""
    with fp16_supported(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_linear, "_NO_AVX512", False)  # OpenBLAS takes its operands by `.numpy()`
        return _reads(world, tree)


def _reads(world: World, tree: Tree) -> tuple[list[str], list[list[str]]]:
    engine, _ = build_engine(world, tree)
    in_microbatches: list[str] = []
    in_steps: list[list[str]] = []
    for step in range(WARMUP + 1):
        engine.begin_step(step, 1e-4)
        with recorded_reads() as reads:
            for number in range(2):
                engine.accumulate(microbatch(), 6, step, number)
        in_microbatches += reads if step >= WARMUP else []
        with recorded_reads() as reads:
            engine.step(1e6).wait()
        in_steps += [reads] if step >= WARMUP else []
    engine.close()
    return in_microbatches, in_steps


@pytest.mark.parametrize(
    ("rule", "ds_config"),
    sampled(
        itertools.product(("adamw", "lamb"), DS_CONFIGS),
        [("adamw", "fp32_zero1"), ("adamw", "fp32_zero3"), ("adamw", "fp16_zero3"), ("lamb", "fp32_zero2")],
    ),
)
def test_at_most_one_read_per_step_and_none_in_a_microbatch(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, rule: str, ds_config: str
) -> None:
    """Catches `.item()`, `float(tensor)`, `.tolist()` and boolean indexing in a step: a GPU would run dry. And a read
    in which the rank does not seem to wait, so that it could be named as the one that hangs."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config)
    tree["optimizer"] = {"name": rule, "lr": 3e-3}
    for in_microbatches, in_steps in pools[2].run(reads_case, tree):
        assert in_microbatches == []
        assert all(len(reads) <= 1 for reads in in_steps), in_steps
        assert all(read.startswith("host_copy.py:") for reads in in_steps for read in reads), in_steps


class _Stream:
    """A stream of a device that computes asynchronously. Counts how often the host waits for one."""

    waits = 0
    awaited = 0  # how often a stream waits for another one

    def synchronize(self) -> None:
        _Stream.waits += 1

    def wait_stream(self, _other: "_Stream") -> None:
        _Stream.awaited += 1


class _Event:
    def record(self) -> None: ...

    def query(self) -> bool:
        return True


def waits_case(world: World, tree: Tree) -> tuple[int, int]:
    """How often the host waits in microbatches and steps, and streams wait for each other, as on a GPU."""
    accelerator = get_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
            patch.setattr(accelerator, name, lambda: False)
        for name in ("current_stream", "default_stream"):
            patch.setattr(accelerator, name, _Stream)
        patch.setattr(accelerator, "synchronize", _Stream().synchronize)
        patch.setattr(type(accelerator), "Stream", _Stream)
        patch.setattr(type(accelerator), "Event", _Event)
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        engine, _ = build_engine(world, tree)
        for step in range(WARMUP + 1):
            _Stream.waits = _Stream.awaited = 0
            engine.begin_step(step, 1e-4)
            for number in range(2):
                engine.accumulate(microbatch(), 6, step, number)
            engine.step(1e6)
        found = _Stream.waits, _Stream.awaited
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_streams_wait_in_place_of_the_host(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ranks: int
) -> None:
    """Catches a host that waits for gradients or weights at ZeRO 3, and a stream that uses them too early."""
    for waits, awaited in pools[ranks].run(waits_case, run_config(tmp_path, wordpiece_corpus, "bf16_zero3")):
        assert waits == 0
        assert awaited > 2


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        float,
        bool,
        Tensor.tolist,
        Tensor.numpy,
        np.asarray,
        Tensor.cpu,
        Tensor.nonzero,
        lambda value: torch.equal(value, value),
        lambda value: value[value > 0],
    ],
)
def test_a_read_is_recorded(read: Callable[[Tensor], object]) -> None:
    """Catches a test that would pass although the host reads values."""
    value = torch.tensor(2.0)
    with recorded_reads() as reads:
        value.mul(2).add_(value)
        assert reads == []
        read(value)
    assert len(reads) == 1


def test_a_read_in_a_backward_hook_is_recorded() -> None:
    """Catches reads that are missed because autograd calls the code."""
    value = torch.ones(3, requires_grad=True)
    value.register_hook(lambda gradient: gradient * gradient.sum().item())
    with recorded_reads() as reads:
        value.sum().backward()
    assert len(reads) == 1
