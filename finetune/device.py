"""The device and precision to compute in, and how many examples fit into its memory at once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from experiment.errors import UserError, is_out_of_memory
from experiment.process.hardware import available_device, has_native_bf16

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """The device and precision of a computation. Weights are always fp32."""

    torch_device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32, no autocast

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.torch_device.type, dtype=self.dtype, enabled=self.dtype is not None)


CPU = Device(torch.device("cpu"), dtype=None)


def choose_device(precision: str, key: str = "training.precision") -> Device:
    """Choose a device, see `available_device`. Precision "auto" is bf16 if the device supports it natively, else fp32.

    key: the name of the precision in messages. Raises UserError for a precision that the device does not support.
    """
    if precision not in ("auto", *_DTYPES):
        raise UserError(f"{key}: expected auto, {', '.join(_DTYPES)}, found {precision!r}")
    device = available_device()
    bf16 = has_native_bf16(device.type)
    if precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}: fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if precision == "bf16" and not bf16 and device.type == "cuda":
        raise UserError(f"{key}: this GPU does not support bf16; use fp16 or fp32")
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    return Device(device, _DTYPES[precision])


class MicrobatchSize:
    """A number of examples, which is halved when memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reduced: int | None = None  # the size after memory has run out

    def compute(self, examples: Sequence[T], compute: Callable[[Sequence[Sequence[T]]], None]) -> None:
        """Call `compute` with the examples in microbatches, and again with smaller ones whenever memory runs out.

        Raises UserError if there is not enough memory for a single example.
        """
        size = min(self.size, len(examples))
        while not _fits(compute, [examples[start : start + size] for start in range(0, len(examples), size)]):
            if size == 1:
                raise UserError("out of memory with one example; lower model.max_seq_length in the fine-tuning config")
            size = -(-size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < min(self.size, len(examples)):
            if self.reduced is None:
                message = "out of memory: computing %d examples at once, not %d; results are equal up to dropout masks"
                log.warning(message, size, self.size)
            self.reduce(size)

    def reduce(self, size: int) -> None:
        """Compute at most `size` examples from now on."""
        self.size = self.reduced = min(size, self.size)


def _fits(compute: Callable[[Sequence[Sequence[T]]], None], parts: Sequence[Sequence[T]]) -> bool:
    """Return whether memory suffices. When this returns, a failed computation has released its own."""
    try:
        compute(parts)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
