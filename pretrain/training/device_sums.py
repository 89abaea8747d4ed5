"""Sums of whole numbers over all ranks, computed by their GPUs while these train.

gloo sends such sums around a ring of all ranks, in 2 (N - 1) messages one after another: at 1,024 ranks that takes
longer than a short step. NCCL adds them in a tree over its own network, and no host waits for another one.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_POLL_SECONDS = 0.0001


class DeviceSums:
    """Takes the place of `CpuGroup.start_all_reduce_sum` where ranks have GPUs."""

    def __init__(self, device: torch.device, on_progress: Callable[[], None]) -> None:
        """`on_progress`: called when sums are complete."""
        self._device = device
        self._on_progress = on_progress
        # Of its own, so that training's kernels do not wait for it. The group's collectives still run in the order of
        # their calls.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_all_reduce_sum(self, numbers: Sequence[int]) -> "PendingDeviceSums":
        """Start to sum each number over all ranks. Collective of the default group, in the order of its calls."""
        host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
        with torch.cuda.stream(self._stream):
            sums = host.to(self._device, non_blocking=True)
            dist.all_reduce(sums)
            host.copy_(sums, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return PendingDeviceSums(host, copied, self._on_progress)


class PendingDeviceSums:
    """Sums that are being computed."""

    def __init__(self, sums: Tensor, copied: torch.cuda.Event, on_progress: Callable[[], None]) -> None:
        """`sums`: in host memory, valid after the event `copied`."""
        self._sums = sums
        self._copied = copied
        self._on_progress = on_progress

    def wait(self) -> list[int]:
        """The sums. After a step they are complete, because the step reads the norm of the gradient, which the same
        group has summed later. Otherwise this polls in this file, which tells `RankHeartbeat` that the rank waits."""
        while not self._copied.query():  # type: ignore[no-untyped-call]
            time.sleep(_POLL_SECONDS)
        self._on_progress()
        return self._sums.tolist()
