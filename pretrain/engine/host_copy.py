"""Copies of a GPU's numbers in host memory, read without waiting for the work that was queued after them."""

import time
from typing import Any

import torch
from torch import Tensor

_POLL_SECONDS = 0.0001


class HostCopy:
    """A copy of a tensor, which the current stream makes when it comes to it."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor`: on a GPU."""
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def wait(self) -> list[Any]:
        """Return the numbers, as `Tensor.tolist` returns them. Polls in this file, which tells `RankHeartbeat` that the
        rank waits."""
        while not self._copied.query():  # type: ignore[no-untyped-call]
            time.sleep(_POLL_SECONDS)
        return self._host.tolist()
