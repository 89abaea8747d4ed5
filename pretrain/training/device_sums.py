"""Sums of whole numbers over all ranks, computed by their GPUs while these train.

gloo sends such sums around a ring of all ranks, in 2 (N - 1) messages one after another: at 1,024 ranks that takes
longer than a short step. NCCL adds them in a tree over its own network, and no host waits for another one.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from pretrain.engine.host_copy import HostCopy


class DeviceSums:
    """Takes the place of `CpuGroup.start_all_reduce_sum` where ranks have GPUs."""

    def __init__(self, device: torch.device, on_progress: Callable[[], None]) -> None:
        """`on_progress`: called when sums are complete."""
        self._device = device
        self._on_progress = on_progress
        # Of its own, so that training's kernels do not wait for it. The group's collectives still run in the order of
        # their calls.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_all_reduce_sum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Start to sum each number over all ranks. Returns a function that waits for the sums, which are complete when
        the GPUs have finished the step before this one. Collective of the default group, in the order of its calls."""
        host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
        with torch.cuda.stream(self._stream):
            sums = host.to(self._device, non_blocking=True)
            dist.all_reduce(sums)
            copy = HostCopy(sums)

        def wait_for_sums() -> list[int]:
            found = copy.wait()
            self._on_progress()
            return found

        return wait_for_sums
