"""Ranks on GPUs: spawned processes, because CUDA does not work in forked ones."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any, Literal

import pytest
import torch

from pretrain.world import World
from rank_pool import free_port, give_up
from waiting import LIMIT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests in this folder if there is no CUDA device."""
    missing = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


class SpawnedRanks:
    """Like RankPool: `run` calls `case(world, *args)` on every rank."""

    def __init__(self, size: int, device: Literal["cuda", "cpu"]) -> None:
        port = free_port()
        self._ranks = [
            ProcessPoolExecutor(1, get_context("spawn"), initializer=_connect, initargs=(rank, size, port, device))
            for rank in range(size)
        ]

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        running: list[Future[Any]] = [rank.submit(_run_case, case, *args) for rank in self._ranks]
        return [result.result(timeout=LIMIT) for result in running]

    def close(self) -> None:
        for rank in self._ranks:
            rank.shutdown(wait=False, cancel_futures=True)


def _connect(rank: int, size: int, port: int, device: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_MODE": "disabled"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # as pretrain/run.py
    from pretrain.engine.process_group import connect

    connect(timedelta(seconds=60), give_up)


def _run_case(case: Callable[..., Any], *args: Any) -> Any:
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return case(world, *args)


@pytest.fixture(scope="session")
def gpus() -> Iterator[SpawnedRanks]:
    """Two ranks if there are two GPUs, else one: NCCL does not let ranks share a GPU."""
    ranks = SpawnedRanks(min(torch.cuda.device_count(), 2), "cuda")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def cpu() -> Iterator[SpawnedRanks]:
    """One rank on the CPU, for comparison."""
    ranks = SpawnedRanks(1, "cpu")
    yield ranks
    ranks.close()
