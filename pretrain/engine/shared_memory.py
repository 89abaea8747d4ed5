"""Collectives of CPU ranks on one host, through memory that they share.

gloo sends everything over sockets, also on one host: it takes three to four times as long for the gradients of a model,
and more than twice as long for its weights (benchmarks/RESULTS.md, "Experiments").
"""

import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

BUFFER_BYTES = 2**23  # of each rank: two halves, used in turn
_TOKEN_BYTES = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESS_IDS = Path("/proc/self/ns/pid")


class SharedMemory:
    """A buffer of each rank, which the other ranks read. All methods are collective.

    Ranks write to one half of their buffers, wait for each other once, read, and take the other half for the next
    data: when they have waited for that, all have read the first half, and it may be written again.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """`buffers`: [ranks], of bytes."""
        self._halves = [buffer.chunk(2) for buffer in buffers]
        self._rank = dist.get_rank()
        self._nothing = torch.zeros(1)

    def reduce_scatter(self, parts: Sequence[Tensor], total: Tensor) -> None:
        """Sum to `total` the flat tensors that the ranks have for this one, as `sum_in_order`.

        parts: [ranks], tensors of this rank for each of them.
        """
        ranks, numel, dtype = len(parts), total.numel(), parts[0].dtype
        length = BUFFER_BYTES // 2 // dtype.itemsize // (ranks - 1)
        for first in range(0, numel, length):
            end = min(first + length, numel)
            slots = [half[: length * (ranks - 1)].view(ranks - 1, length) for half in self._next_halves(dtype)]
            for rank, part in enumerate(parts):
                if rank != self._rank:
                    slots[self._rank][_slot(self._rank, rank), : end - first].copy_(part[first:end])
            self._barrier()
            terms = [
                parts[rank][first:end] if rank == self._rank else slots[rank][_slot(rank, self._rank), : end - first]
                for rank in range(ranks)
            ]
            sum_in_order(terms, total[first:end])

    def all_gather(self, parts: Sequence[Tensor]) -> None:
        """Copy part n of rank n, a flat tensor, to part n of the others."""
        numel, dtype = parts[0].numel(), parts[0].dtype
        length = BUFFER_BYTES // 2 // dtype.itemsize
        for first in range(0, numel, length):
            end = min(first + length, numel)
            halves = self._next_halves(dtype)
            halves[self._rank][: end - first].copy_(parts[self._rank][first:end])
            self._barrier()
            for rank, part in enumerate(parts):
                if rank != self._rank:
                    part[first:end].copy_(halves[rank][: end - first])

    def _next_halves(self, dtype: torch.dtype) -> list[Tensor]:
        """Swap the halves; returns them, [ranks], flat."""
        self._halves = [(second, first) for first, second in self._halves]
        return [half.view(dtype) for half, _ in self._halves]

    def _barrier(self) -> None:
        dist.all_reduce(self._nothing)


def _slot(sender: int, receiver: int) -> int:
    """Return the place in the buffer of one rank of the data for another."""
    return receiver - (receiver > sender)


def sum_in_order(terms: Sequence[Tensor], total: Tensor) -> None:
    """Sum at least two tensors from first to last, so that rounding is the same each time."""
    torch.add(functools.reduce(torch.add, terms[:-1]), terms[-1], out=total)


@dataclass(frozen=True)
class _Buffer:
    """The location of a rank's buffer, and the bytes at its start."""

    processes: str  # in which namespace of which machine the path names a process
    path: str
    token: bytes


def open_shared_memory() -> SharedMemory | None:
    """Open memory that the ranks share; None if there is only one rank, they are on several hosts or in several
    containers, or the system refuses. Collective."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return None
    file = _create_file()
    found: list[_Buffer | None] = [None] * ranks
    dist.all_gather_object(found, None if file is None else _describe(file))
    mapped = _map([buffer for buffer in found if buffer is not None])
    shared = torch.tensor(len(mapped) == ranks)
    dist.all_reduce(shared, dist.ReduceOp.MIN)  # also: no rank writes before all have compared the tokens
    if file is not None:
        os.close(file)  # mapped memory stays until the last rank ends
    return SharedMemory(mapped) if shared.item() else None


def _create_file() -> int | None:
    """Return the descriptor of a file in memory, which needs no place in /dev/shm and no deletion."""
    try:
        file = os.memfd_create("deepcloze")
    except (AttributeError, OSError):  # some builds of Python lack it
        return None
    try:
        os.posix_fallocate(file, 0, BUFFER_BYTES)  # writing to memory that cannot be had would kill the process
    except OSError:
        os.close(file)
        return None
    return file


def _describe(file: int) -> _Buffer | None:
    token = os.urandom(_TOKEN_BYTES)
    try:
        os.pwrite(file, token, 0)
        processes = f"{_BOOT_ID.read_text()} {_PROCESS_IDS.readlink()}"
        return _Buffer(processes, f"/proc/{Path('/proc/self').readlink()}/fd/{file}", token)
    except OSError:
        return None


def _map(found: Sequence[_Buffer]) -> list[Tensor]:
    """Return the buffers that belong to these ranks; none if they are on several machines or in several containers."""
    buffers = []
    if len({buffer.processes for buffer in found}) == 1:
        for expected in found:
            with suppress(OSError, RuntimeError):
                if Path(expected.path).stat().st_size == BUFFER_BYTES:  # torch would extend a smaller file
                    buffer = torch.from_file(expected.path, shared=True, size=BUFFER_BYTES, dtype=torch.uint8)
                    if bytes(buffer[:_TOKEN_BYTES].tolist()) == expected.token:
                        buffers.append(buffer)
    return buffers
