"""Memory that ranks on one host share, compared with gloo."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.engine import shared_memory as module
from pretrain.engine.shared_memory import SharedMemory, open_shared_memory
from pretrain.engine.zero_step import sum_over_ranks
from pretrain.world import World
from rank_pool import RankPool


def sum_case(world: World, numel: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """This rank's part of a sum, twice with shared memory, then with gloo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 96)
        memory = open_shared_memory()
        assert isinstance(memory, SharedMemory)
        found = []
        for shared in (memory, memory, None):
            whole = torch.randn(numel * world.size, generator=torch.Generator().manual_seed(world.rank)) * 1e4
            partition = whole.narrow(0, numel * world.rank, numel)
            sum_over_ranks(whole, partition, dtype, shared)
            found.append(partition.tolist())
    assert found[0] == found[1]
    return found[0], found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 4, 12, 50])
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_are_those_of_gloo(pools: dict[int, RankPool], ranks: int, numel: int, dtype: torch.dtype) -> None:
    """Catches another order of the sum, parts larger than the buffer that are cut wrongly, and values that are read
    before they are written or after they were overwritten."""
    for shared, gloo in pools[ranks].run(sum_case, numel, dtype):
        assert shared == gloo


def gather_case(world: World, numel: int) -> list[list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 96)
        memory = open_shared_memory()
        parts = [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(world.size)]
        for number in range(3):
            parts[world.rank].copy_(torch.arange(numel) + 100 * world.rank + number)
            memory.all_gather(parts)
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("numel", [1, 48, 100])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_all_parts(pools: dict[int, RankPool], ranks: int, numel: int) -> None:
    """Catches parts that are mixed up, and those of an earlier call."""
    expected = [(torch.arange(numel) + 100 * rank + 2).bfloat16().tolist() for rank in range(ranks)]
    assert pools[ranks].run(gather_case, numel) == [expected] * ranks


def slow_reader_case(world: World) -> list[list[float]]:
    """Sums and copies of several parts, on rank 0 with a pause before it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 96)
        memory = open_shared_memory()
        if world.rank == 0:
            barrier = memory._barrier
            patch.setattr(memory, "_barrier", lambda: (barrier(), time.sleep(0.005)))
        found = []
        for number in range(4):
            values = torch.arange(60, dtype=torch.float32) + number
            total = torch.empty(60 // world.size)
            memory.reduce_scatter(values.chunk(world.size), total)
            parts = list(values.chunk(world.size))
            parts[world.rank].copy_(total)
            memory.all_gather(parts)
            found.append(values.tolist())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_fast_rank_overwrites_nothing_that_a_slow_one_reads(pools: dict[int, RankPool], ranks: int) -> None:
    """Catches ranks that write to the memory of which another one still reads the last data."""
    expected = [[float(ranks * (value + number)) for value in range(60)] for number in range(4)]
    assert pools[ranks].run(slow_reader_case) == [expected] * ranks


def refused_case(world: World, reason: str) -> bool:
    """Whether memory was shared, although something is different on the last rank."""
    files = sorted(Path("/proc/self/fd").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == world.size - 1:

            def refuse(*_: object, **__: object) -> None:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

            if reason == "namespace":
                patch.setattr(module, "_PROCESS_IDS", Path("/proc/self/ns/net"))
            elif reason == "procfs":
                patch.setattr(module, "_BOOT_ID", Path("/no"))
            elif reason == "map":
                patch.setattr(torch, "from_file", refuse)
            elif reason == "no function":
                patch.delattr(os, "memfd_create")
            elif reason == "another file":
                patch.setattr(os, "pwrite", lambda *_: None)
            elif reason == "smaller file":
                patch.setattr(os, "posix_fallocate", lambda file, *_: os.truncate(file, 96))
            else:
                patch.setattr(os, reason, refuse)
        memory = open_shared_memory()
        dist.barrier()
    assert sorted(Path("/proc/self/fd").iterdir()) == files, "a file stays open"
    return memory is not None


@pytest.mark.parametrize(
    "reason",
    [
        "namespace",
        "procfs",
        "map",
        "no function",
        "another file",
        "smaller file",
        "memfd_create",
        "posix_fallocate",
    ],
)
def test_without_shared_memory_all_ranks_use_gloo(pools: dict[int, RankPool], reason: str) -> None:
    """Catches ranks in two containers that open each other's processes, ranks that wait for one that cannot share, and
    memory that does not exist when it is written."""
    assert pools[2].run(refused_case, reason) == [False, False]
