"""Numbers of a device, read by the host.

While the host waits in this file, `RankHeartbeat` counts the rank as waiting: its GPU may be in a collective.
"""

import time
from typing import Any

import torch
from torch import Tensor

_POLL_SECONDS = 0.0001


def read_numbers(tensor: Tensor) -> Any:
    """Like `Tensor.tolist`."""
    return tensor.tolist()


class HostCopy:
    """A copy of a tensor, which the current stream makes when it comes to it. Reading it does not wait for later
    work."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor`: on a GPU."""
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def wait(self) -> list[Any]:
        """Return the numbers, as `Tensor.tolist` returns them."""
        while not self._copied.query():  # type: ignore[no-untyped-call]
            time.sleep(_POLL_SECONDS)
        return self._host.tolist()
