"""Sums and copies between CPU ranks of one host, through memory that they share.

gloo sends everything over sockets, also on one host: five times as long for the gradients of a model, and three times
for its weights (benchmarks/RESULTS.md, "Experiments").
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_BYTES = 2**22  # of the buffer of each rank
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESS_IDS = Path("/proc/self/ns/pid")


class SharedMemory:
    """A buffer of each rank, which the other ranks read. All methods are collective."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """`buffers`: [ranks], of bytes."""
        self._buffers = buffers
        self._rank = dist.get_rank()
        self._nothing = torch.zeros(1)

    def sum(self, parts: Sequence[Tensor], total: Tensor) -> None:
        """`total` becomes the sum of the flat tensors that the ranks have for this one, as `sum_in_order`.

        parts: [ranks], what this rank has for each of them.
        """
        ranks, numel, dtype = len(parts), total.numel(), parts[0].dtype
        length = _BYTES // dtype.itemsize // (ranks - 1)
        slots = [buffer.view(dtype)[: length * (ranks - 1)].view(ranks - 1, length) for buffer in self._buffers]
        for first in range(0, numel, length):
            end = min(first + length, numel)
            for rank, part in enumerate(parts):
                if rank != self._rank:
                    slots[self._rank][_slot(self._rank, rank), : end - first].copy_(part[first:end])
            self._wait_for_ranks()
            terms = [
                parts[rank][first:end] if rank == self._rank else slots[rank][_slot(rank, self._rank), : end - first]
                for rank in range(ranks)
            ]
            sum_in_order(terms, total[first:end])
            self._wait_for_ranks()

    def gather(self, parts: Sequence[Tensor]) -> None:
        """Copy part n of rank n, a flat tensor, to part n of the others."""
        numel, dtype = parts[0].numel(), parts[0].dtype
        length = _BYTES // dtype.itemsize
        buffers = [buffer.view(dtype) for buffer in self._buffers]
        for first in range(0, numel, length):
            end = min(first + length, numel)
            buffers[self._rank][: end - first].copy_(parts[self._rank][first:end])
            self._wait_for_ranks()
            for rank, part in enumerate(parts):
                if rank != self._rank:
                    part[first:end].copy_(buffers[rank][: end - first])
            self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        dist.all_reduce(self._nothing)


def _slot(sender: int, receiver: int) -> int:
    """Where the buffer of one rank has what it sends to another."""
    return receiver - (receiver > sender)


def sum_in_order(terms: Sequence[Tensor], total: Tensor) -> None:
    """Sum at least two tensors from first to last, so that rounding is the same each time."""
    torch.add(functools.reduce(torch.add, terms[:-1]), terms[-1], out=total)


def open_shared_memory() -> SharedMemory | None:
    """None if the ranks cannot share memory: they are on several hosts or in several containers, or the system refuses.
    Collective."""
    ranks = dist.get_world_size()
    file, path = _make_buffer()
    descriptions: list[tuple[str, str] | None] = [None] * ranks
    dist.all_gather_object(descriptions, path and (_process_namespace(), path))
    buffers = None
    if ranks > 1 and None not in descriptions and len({found[0] for found in descriptions if found}) == 1:
        buffers = _map([found[1] for found in descriptions if found])
    opened = torch.tensor(int(buffers is not None))
    dist.all_reduce(opened, dist.ReduceOp.MIN)
    if file is not None:
        os.close(file)  # mapped memory stays until the last rank ends
    return SharedMemory(buffers) if buffers is not None and opened.item() else None


def _make_buffer() -> tuple[int | None, str | None]:
    """A file in memory, which needs no place in /dev/shm and no deletion, and the path at which other ranks open it."""
    if sys.platform != "linux":
        return None, None
    try:
        file = os.memfd_create("deepcloze")
    except OSError:
        return None, None
    try:
        os.posix_fallocate(file, 0, _BYTES)  # writing to memory that cannot be had would kill the process
    except OSError:
        return file, None
    return file, f"/proc/{os.getpid()}/fd/{file}"


def _process_namespace() -> str:
    """Where a process id means this process."""
    try:
        return f"{_BOOT_ID.read_text()} {_PROCESS_IDS.readlink()}"
    except OSError:
        return f"unknown {dist.get_rank()}"


def _map(paths: Sequence[str]) -> list[Tensor] | None:
    try:
        return [torch.from_file(path, shared=True, size=_BYTES, dtype=torch.uint8) for path in paths]
    except (OSError, RuntimeError):
        return None
