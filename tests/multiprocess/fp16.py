"""Run fp16 tests on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def fp16_supported() -> Iterator[None]:
    """Pass the device check, which CPUs without fp16 arithmetic fail although torch emulates it."""
    from deepspeed.accelerator import get_accelerator

    device: Any = get_accelerator()
    before = device.is_fp16_supported
    device.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        device.is_fp16_supported = before
