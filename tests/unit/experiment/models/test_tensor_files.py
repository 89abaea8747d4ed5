import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from experiment.models import tensor_files
from experiment.models.tensor_files import save_tensors

DTYPES = list(tensor_files._DTYPES)


def tensors() -> dict[str, torch.Tensor]:
    """Of all types, some of them empty, scalars or in several parts."""
    shapes = [(3, 5), (), (0, 4), (41,)]
    drawn = {f"{dtype}@{shape}": torch.randn(shape).to(dtype) for dtype in DTYPES for shape in shapes}
    return drawn | {"größe": torch.arange(1000.0).view(10, 100).T.contiguous()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("part", [1, 100, 1 << 26])
def test_files_are_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str] | None, part: int
) -> None:
    """Catches a file that other programs cannot read, and parts that are lost or written twice."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of thousands of parts
    path, written = tmp_path / "model.safetensors", tensors()
    save_tensors(written, path, metadata, part)
    assert path.read_bytes() == safetensors.torch.save(written, metadata)


def test_each_part_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that leaves gigabytes to one fsync: a slow disk then looks like one that does not answer."""
    path, sizes = tmp_path / "model.safetensors", []
    monkeypatch.setattr(os, "fsync", lambda _: sizes.append(path.stat().st_size))
    save_tensors({"small": torch.zeros(10), "large": torch.zeros(10_000)}, path, part_bytes=4000)
    assert all(after - before <= 8000 for before, after in zip([0, *sizes], sizes, strict=False))
    assert sizes[-1] == path.stat().st_size > 40_000


def test_a_type_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    """Catches a bare KeyError in the thread of saves, and a file that is left behind."""
    tensors = {"weight": torch.zeros(2), "phases": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(TypeError, match=r"phases .* torch\.complex128"):
        save_tensors(tensors, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Catches an error that does not say which file could not be written."""
    with pytest.raises(OSError, match="No space left") as caught:
        save_tensors({"weight": torch.zeros(100_000)}, Path("/dev/full"))
    assert caught.value.filename == "/dev/full"
