"""How many examples are computed at once."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from experiment.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Microbatch:
    """A number of examples, which is halved when memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._warned = False

    def compute(self, examples: Sequence[T], compute: Callable[[Sequence[Sequence[T]]], None]) -> None:
        """Call `compute` with the examples in microbatches, and again with smaller ones whenever memory runs out.

        Raises UserError if there is not enough memory for a single example.
        """
        size = min(self.size, len(examples))
        while not _fits(compute, _parts(examples, size)):
            if size == 1:
                raise UserError("out of memory with a single example; lower model.max_seq_length")
            size = -(-size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < min(self.size, len(examples)):
            self._shrink(size)

    def _shrink(self, size: int) -> None:
        if not self._warned:
            log.warning("out of memory: computing %d examples at once, not %d; updates stay the same", size, self.size)
        self.size, self._warned = size, True


def _parts(examples: Sequence[T], size: int) -> list[Sequence[T]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _fits(compute: Callable[[Sequence[Sequence[T]]], None], parts: Sequence[Sequence[T]]) -> bool:
    """Whether memory suffices. When this returns, a failed computation has released its own."""
    try:
        compute(parts)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """On the CPU, torch's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
