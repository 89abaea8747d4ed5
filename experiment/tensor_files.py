"""Files of tensors that whoever may read the other files of their folder may read too.

safetensors writes files that only their owner can read, whatever the umask.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from experiment.disk_errors import disk_error_number


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError if the disk refuses it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if (number := disk_error_number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    _set_mode(path, mode)


def share_tensors(model: Path) -> None:
    """Give the safetensors files of a Hugging Face folder the mode of its config.json."""
    mode = (model / "config.json").stat().st_mode
    for path in model.glob("*.safetensors"):
        _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with suppress(PermissionError):  # some network file systems have no modes
            path.chmod(mode)
