"""The device and precision of a fine-tuning run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from experiment.errors import UserError
from experiment.native_bf16 import has_native_bf16

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Where to compute, and in which precision. Weights are always fp32."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32, no autocast

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            yield


def choose_device(precision: str, key: str = "training.precision") -> Device:
    """CUDA if available, else the CPU. Precision "auto" is bf16 if the device supports it natively, else fp32.

    key: what messages call the precision. Raises UserError for a precision that the device does not support.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = has_native_bf16(device.type)
    if precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}: fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if precision == "bf16" and not bf16 and device.type == "cuda":
        raise UserError(f"{key}: this GPU does not support bf16; use fp16 or fp32")
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    return Device(device, _DTYPES[precision])
