"""Attributes and methods of tensors that know devices, for tensors on the simulated GPU.

They replace those of `torch.Tensor`, because a mode for functions does not reach code that autograd calls.
"""

from typing import Any

import torch
from torch import Tensor

from simulated_gpu.operators import Device

_device = Tensor.device.__get__  # type: ignore[attr-defined]
_is_cpu = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_to, _type, _numpy, _tolist = Tensor.to, Tensor.type, Tensor.numpy, Tensor.tolist


def tensor_methods(device: Device, index: int) -> dict[str, Any]:
    """By name. `index`: of the GPU."""
    memory, timeline = device.memory, device.timeline
    gpu = torch.device("cuda", index)

    def place(tensor: Tensor) -> torch.device:
        return gpu if memory.is_on_gpu(tensor) else _device(tensor)

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        target, dtype, rest = _parse(args, options)
        on_gpu = memory.is_on_gpu(tensor)
        if target is None or target.type not in ("cuda", "cpu") or (target.type == "cuda") == on_gpu:
            return _to(tensor, dtype or tensor.dtype, **rest)
        with device.moving(to_gpu=not on_gpu):
            return _to(tensor, dtype or tensor.dtype, **rest | {"copy": True})

    def type_(tensor: Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        if dtype is not None:
            return _type(tensor, dtype, *args, **options)
        name = _type(tensor)
        return name.replace("torch.", "torch.cuda.") if memory.is_on_gpu(tensor) else name

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        if memory.is_on_gpu(tensor):
            raise RuntimeError("only tensors on the CPU can be pinned")
        if memory.is_pinned(tensor):
            return tensor
        pinned = tensor.clone()
        memory.put(pinned, "pinned")
        return pinned

    def use_on_host(tensor: Tensor, what: str) -> None:
        block = memory.block(tensor)
        if block is not None:
            timeline.use_on_host(what, [block], [])

    def numpy(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if memory.is_on_gpu(tensor):
            raise TypeError(f"can't convert {gpu} device type tensor to numpy")
        use_on_host(tensor, "numpy")
        return _numpy(tensor, *args, **options)

    def tolist(tensor: Tensor) -> Any:
        on_host = to(tensor, "cpu")
        use_on_host(on_host, "tolist")
        return _tolist(on_host)

    return {
        "device": property(place),
        "is_cuda": property(memory.is_on_gpu),
        "is_cpu": property(lambda tensor: _is_cpu(tensor) and not memory.is_on_gpu(tensor)),
        "get_device": lambda tensor: index if memory.is_on_gpu(tensor) else -1,
        "to": to,
        "cuda": lambda tensor, device=None, non_blocking=False, **_: to(tensor, gpu, non_blocking=non_blocking),
        "cpu": lambda tensor, **_: to(tensor, "cpu"),
        "type": type_,
        "pin_memory": pin_memory,
        "is_pinned": lambda tensor, *_: memory.is_pinned(tensor),
        "record_stream": lambda *_: None,
        "numpy": numpy,
        "__array__": lambda tensor, dtype=None, **_: numpy(tensor).__array__(dtype),
        "tolist": tolist,
    }


def _parse(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.device | None, Any, dict[str, Any]]:
    """The arguments of `Tensor.to`: a device, a dtype, and others."""
    rest = dict(options)
    target, dtype = rest.pop("device", None), rest.pop("dtype", None)
    flags = []
    for value in (*args, *([rest.pop("other")] if "other" in rest else [])):
        if isinstance(value, Tensor):
            target, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            target = value
    rest |= dict(zip(("non_blocking", "copy"), flags, strict=False))
    if isinstance(target, int):
        target = torch.device("cuda", target)
    return None if target is None else torch.device(target), dtype, rest
