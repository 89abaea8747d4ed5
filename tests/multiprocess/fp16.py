"""Run fp16 tests on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pretrain.world import World
from runs import Tree, pretrain_case


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


@fp16_supported()
def any_precision_case(world: World, tree: Tree, stop_after: int | None = None) -> str:
    """A run that may be in fp16."""
    return pretrain_case(world, tree, stop_after)
