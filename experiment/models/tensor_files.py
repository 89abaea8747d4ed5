"""Files of tensors in the safetensors format (huggingface.co/docs/safetensors).

The library's own writer is not used for checkpoints: it syncs gigabytes in one fsync, so a slow disk
cannot be distinguished from one that does not respond. Its files are readable by their owner only, whatever the umask.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.files import named_errors, sync

_PART = 1 << 26  # bytes between two calls of fsync
_ALIGNMENT = 8  # bytes, of the first tensor
# As the library since 0.5, in its order: larger elements first, so that all are aligned.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, part_bytes: int = _PART
) -> None:
    """Write tensors on the host to a file, and wait until they are on disk.

    Raises OSError if the disk refuses it, TypeError for a tensor of a type that the format lacks.

    Each part of 64 MiB is synced, so as long as the disk makes progress, calls of fsync return and the thread uses
    processor time.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"the tensor {name} cannot be saved: safetensors files cannot contain {tensor.dtype}")
    ordered = dict(sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])))
    unsynced = 0
    with named_errors(path), path.open("wb") as file:
        for part in _parts(ordered, metadata, part_bytes):
            file.write(part)
            unsynced += len(part)
            if unsynced >= part_bytes:
                file.flush()
                sync(file.fileno())
                unsynced = 0
        file.flush()
        sync(file.fileno())


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, part_bytes: int) -> Iterator[Any]:
    """Yield the content of the file: bytes and arrays of bytes. The header is one part, others are at most
    `part_bytes`."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(content), part_bytes):
            yield content[start : start + part_bytes]


def share_tensors(model: Path) -> None:
    """Give the safetensors files of a Hugging Face folder the mode of its config.json."""
    mode = (model / "config.json").stat().st_mode
    for path in model.glob("*.safetensors"):
        if path.stat().st_mode != mode:
            with suppress(PermissionError):  # some network file systems have no modes
                path.chmod(mode)
