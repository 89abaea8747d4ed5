"""Files of tensors that whoever may read the other files of their folder may read too.

safetensors writes files that only their owner can read, whatever the umask.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def share_tensors(model: Path) -> None:
    """Give the safetensors files of a Hugging Face folder the mode of its config.json."""
    mode = (model / "config.json").stat().st_mode
    for path in model.glob("*.safetensors"):
        path.chmod(mode)
