"""One rank of the timed all-reduce: `python -m launcher.preflight.measure`, started like a rank of a run.

Measures, in this order, matrix products on each rank, transfers between neighbouring hosts, and all-reduces over all
ranks. Rank 0 prints the result as one line.
"""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.errors import UserError
from launcher.preflight.bandwidth import LIMIT_SECONDS, RESULT_MARK
from pretrain.engine.process_group import LostRankError, connect, deadline
from pretrain.world import World

_TRANSFER_BYTES = 4 << 20
_FIRST_BYTES, _MOST_BYTES = 1 << 20, 256 << 20
_ENOUGH_SECONDS = 0.1  # to measure the network rather than its delay
_REPEATS = 10


def main() -> NoReturn:
    limit = datetime.timedelta(seconds=LIMIT_SECONDS)
    with deadline(limit, lambda: _fail(f"not done within {LIMIT_SECONDS:.0f} s")):
        try:
            world = connect(limit / 2, _fail)
            result = _measure(world)
        except (LostRankError, UserError) as error:
            _fail(str(error))
        if world.rank == 0:
            print(RESULT_MARK + json.dumps(result), flush=True)
        dist.barrier()
    _exit(0)


def _measure(world: World) -> dict[str, object]:
    """Return the fields of a `Measurement`."""
    device = torch.device("cuda", world.local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    compute = _compute_seconds(device)
    sizes = [int(row[0]) for row in _gather([float(os.environ["LOCAL_SIZE"])], world, device)]
    hosts = _ranks_by_host(sizes)
    leaders = [ranks[0] for ranks in hosts]
    link = _link_bandwidth(leaders, world, device)
    size, seconds = _all_reduce_seconds(device)
    rows = _gather([compute, link], world, device)
    return {
        "ranks": world.size,
        "bytes": size,
        "seconds": seconds,
        "compute_seconds": [max(rows[rank][0] for rank in ranks) for ranks in hosts],
        "link_bandwidths": [rows[leader][1] for leader in leaders] if len(leaders) > 1 else [],
    }


def _ranks_by_host(sizes: Sequence[int]) -> list[range]:
    """Return the ranks on each host, which follow each other. sizes: of each rank, how many its host has."""
    hosts, start = list[range](), 0
    while start < len(sizes):
        hosts.append(range(start, start + sizes[start]))
        start += sizes[start]
    return hosts


def _gather(values: list[float], world: World, device: torch.device) -> list[list[float]]:
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(rows, own)
    return [row.tolist() for row in rows]


def _compute_seconds(device: torch.device) -> float:
    """Return the seconds of a matrix product, the fastest of a few: other processes disturb the rest."""
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, device=device)
    return _fastest(lambda: matrix @ matrix, device)


def _link_bandwidth(leaders: list[int], world: World, device: torch.device) -> float:
    """Return bytes per second to the better connected of the two neighbouring hosts, in a ring of all hosts; 0 on ranks
    that do not lead a host.

    A slow host is slow towards both; its neighbours have another one.
    """
    best = 0.0
    for pairs in _rounds(len(leaders)):
        dist.barrier()
        for first, second in pairs:
            if world.rank in (leaders[first], leaders[second]):
                peer = leaders[second] if world.rank == leaders[first] else leaders[first]
                best = max(best, _transfer(peer, world.rank < peer, device))
    return best


def _rounds(hosts: int) -> list[list[tuple[int, int]]]:
    """Return the neighbours in a ring of hosts as two or three rounds of disjoint pairs."""
    if hosts < 3:
        return [[(0, 1)]] if hosts == 2 else []
    ring = [(host, (host + 1) % hosts) for host in range(hosts)]
    even = hosts - hosts % 2
    return [pairs for pairs in (ring[0:even:2], ring[1:even:2], ring[even:]) if pairs]


def _transfer(peer: int, sends_first: bool, device: torch.device) -> float:
    """Return bytes per second of a message there and back. Both ranks return the same value."""

    def exchange(message: Tensor) -> None:
        for sends in (sends_first, not sends_first):
            dist.send(message, peer) if sends else dist.recv(message, peer)

    exchange(torch.zeros(1, device=device))  # connects
    message, best = torch.zeros(_TRANSFER_BYTES // 4, device=device), 0.0
    for _ in range(_REPEATS):
        seconds = torch.tensor([_seconds(lambda: exchange(message), device)], device=device)
        dist.send(seconds, peer) if sends_first else dist.recv(seconds, peer)
        best = max(best, 2 * _TRANSFER_BYTES / seconds.item())
        if seconds.item() >= _ENOUGH_SECONDS:
            break
    return best


def _all_reduce_seconds(device: torch.device) -> tuple[int, float]:
    """Measure (bytes, seconds) of an all-reduce that takes long enough, or is as large as in a run."""
    size = _FIRST_BYTES
    while True:
        values = torch.zeros(size // 4, device=device)
        dist.all_reduce(values)  # connects
        fastest = _fastest(partial(dist.all_reduce, values), device, repeats=3)
        slowest = torch.tensor(fastest, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks continue, or none
        if slowest.item() >= _ENOUGH_SECONDS or size >= _MOST_BYTES:
            return size, slowest.item()
        size *= 4


def _fastest(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    return min(_seconds(work, device) for _ in range(repeats))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fail(message: str) -> NoReturn:
    print(f"{platform.node()}, rank {os.environ.get('RANK', '0')}: {message}", flush=True)
    _exit(1)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)  # a normal exit with live collective threads sometimes aborts


if __name__ == "__main__":
    main()
