"""Run an operator on tensors that may be on the simulated GPU.

What it creates is on the GPU if a device was given that is one, or else if one of its inputs is. Recorded are operators
whose inputs are on different devices, those that let the host wait, and which memory each one uses on which stream.
"""

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from simulated_gpu.memory import Block, Memory
from simulated_gpu.timeline import COLLECTIVES, Timeline, caller

_CPU = torch.device("cpu")
# The host reads a value, or a size that depends on values.
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "repeat_interleave", "_unique2"}
_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
_INDEXING = {"index", "index_put_", "index_put"}  # copies indices to the device of the tensor
_WITHOUT_VALUES = {"set_", "resize_", "empty_like", "new_empty", "new_empty_strided"}
_OUTPUT_FIRST = {  # collectives whose first argument is written and whose second one is read; others do both with all
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allgather_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}


class _Call(NamedTuple):
    name: str
    inputs: list[Tensor]
    written: list[Tensor]  # of the inputs
    is_view: bool  # uses no memory
    is_asynchronous: bool  # a collective that the current stream does not wait for
    non_blocking: bool


class Device:
    """Runs operators, and records what is wrong."""

    def __init__(self, memory: Memory, timeline: Timeline) -> None:
        self.memory = memory
        self.timeline = timeline
        self.mixed: list[str] = []  # operators whose inputs are on different devices
        self._thread = threading.local()  # `moves_to_gpu`: where the copy that this thread makes goes to

    def run(self, function: OpOverload, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        inputs = list(_tensors((*args, *options.values())))
        on_gpu = [tensor for tensor in inputs if self.memory.is_on_gpu(tensor)]
        creates_on_gpu, options = self._place(options, inputs, on_gpu)
        is_pinned = bool(options.get("pin_memory"))
        output = function(*args, **(options | {"pin_memory": False} if is_pinned else options))
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        created = [tensor for tensor in _tensors((output,)) if tensor.untyped_storage()._cdata not in known]
        if creates_on_gpu or is_pinned:
            for tensor in created:
                self.memory.put(tensor, "gpu" if creates_on_gpu else "pinned")
        call = _describe(function, args, options, inputs, is_fresh=bool(created))
        if on_gpu or (creates_on_gpu and call.name in _COPIES):
            self._check_devices(call, on_gpu)
            self._launch(call, created)
        elif not call.is_view:
            self.timeline.use_on_host(call.name, self._blocks(inputs), self._blocks(call.written))
        return output

    @contextmanager
    def moving(self, to_gpu: bool) -> Iterator[None]:
        """What operators create is on the GPU, or on the host."""
        self._thread.moves_to_gpu = to_gpu
        try:
            yield
        finally:
            self._thread.moves_to_gpu = None

    def launch_kernel(self, name: str, tensors: list[Tensor]) -> None:
        """A kernel that is not an operator, and uses these tensors in ways that are not known."""
        call = _Call(name, tensors, tensors, is_view=False, is_asynchronous=False, non_blocking=False)
        self._check_devices(call, [tensor for tensor in tensors if self.memory.is_on_gpu(tensor)])
        self._launch(call, [])

    def _place(
        self, options: dict[str, Any], inputs: list[Tensor], on_gpu: list[Tensor]
    ) -> tuple[bool, dict[str, Any]]:
        """Whether what is created is on the GPU, and options that a CPU knows."""
        moves_to_gpu = getattr(self._thread, "moves_to_gpu", None)
        if moves_to_gpu is not None:
            return moves_to_gpu, options
        device = options.get("device")
        if device is not None and device.type == "cuda":
            return True, options | {"device": _CPU}
        if device is not None and device.type == "cpu" and not inputs:
            return _is_in_formula_of_backward(), options
        return bool(on_gpu), options

    def _check_devices(self, call: _Call, on_gpu: list[Tensor]) -> None:
        large = [tensor for tensor in call.inputs if tensor.dim() > 0 and tensor.numel() > 0]
        on_host = [tensor for tensor in large if not self.memory.is_on_gpu(tensor)]
        if on_host and call.name in _INDEXING and self.memory.is_on_gpu(call.inputs[0]):
            self._let_host_wait(call.name)
        elif on_host and on_gpu and call.name not in _COPIES | _WITHOUT_VALUES:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in on_host)
            self.mixed.append(f"{call.name} of tensors on the GPU and on the CPU, {shapes} ({caller()})")

    def _launch(self, call: _Call, created: list[Tensor]) -> None:
        reads_value = call.name in _READS or (call.name in _INDEXING and _selects(call.inputs))
        if call.name in _WITHOUT_VALUES or call.is_view:
            return
        worker = COLLECTIVES if call.is_asynchronous else self.timeline.current_stream.name
        used = [*call.written, *created]
        self.timeline.launch(worker, call.name, self._blocks(call.inputs), self._blocks(used))
        if reads_value or (call.name in _COPIES and self._is_copied_at_once(call, used)):
            self._let_host_wait(call.name)

    def _is_copied_at_once(self, call: _Call, written: list[Tensor]) -> bool:
        """Whether the host waits for a copy between it and the GPU."""
        on_host = [
            tensor for tensor in (*call.inputs, *written) if tensor.numel() > 0 and not self.memory.is_on_gpu(tensor)
        ]
        return bool(on_host) and not (call.non_blocking and all(map(self.memory.is_pinned, on_host)))

    def _let_host_wait(self, what: str) -> None:
        self.timeline.wait_on_host(what, self.timeline.snapshot(self.timeline.current_stream.name))

    def _blocks(self, tensors: list[Tensor]) -> list[Block]:
        found = {id(block): block for block in map(self.memory.block, tensors) if block is not None}
        return list(found.values())


class Operators(TorchDispatchMode):
    """Operators that this thread calls run on a device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.run(func, args, kwargs or {})


def _describe(
    function: OpOverload, args: tuple[Any, ...], options: dict[str, Any], inputs: list[Tensor], is_fresh: bool
) -> _Call:
    """`is_fresh`: it has created tensors."""
    name = function.overloadpacket.__name__
    is_collective = function.namespace == "c10d"
    if is_collective:
        written = list(_tensors(args[:1] if name in _OUTPUT_FIRST else args))
    else:
        written = list(_tensors([_argument(position, key, args, options) for position, key in _written(function)]))
    return _Call(
        name=name,
        inputs=inputs,
        written=written,
        is_view=not is_fresh and not written and name not in _READS,
        is_asynchronous=is_collective and bool(_named(function, "async_op", args, options)),
        non_blocking=bool(_named(function, "non_blocking", args, options)),
    )


@functools.cache
def _written(function: OpOverload) -> list[tuple[int, str]]:
    """The arguments that an operator writes: position and name."""
    arguments = enumerate(function._schema.arguments)
    return [(n, arg.name) for n, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write]


@functools.cache
def _position(function: OpOverload, name: str) -> int | None:
    names = [argument.name for argument in function._schema.arguments]
    return names.index(name) if name in names else None


def _named(function: OpOverload, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    position = _position(function, name)
    return None if position is None else _argument(position, name, args, options)


def _argument(position: int, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return args[position] if position < len(args) else options.get(name)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _selects(inputs: list[Tensor]) -> bool:
    """Whether a boolean index selects an unknown number of elements."""
    return any(tensor.dtype == torch.bool for tensor in inputs[1:])


def _is_in_formula_of_backward() -> bool:
    """Whether autograd's own code creates a tensor, which asks for the device that the others seem to be on."""
    if torch._C._current_autograd_node() is None:
        return False
    frame: Any = sys._getframe(1)
    while frame is not None and "/simulated_gpu/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith("/torch/autograd/graph.py")
