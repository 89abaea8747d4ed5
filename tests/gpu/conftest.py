"""Ranks on GPUs, and a limit for each test: `pytest tests/gpu -n 4` replaces a process that hangs or crashes."""

from collections.abc import Iterator

import pytest
import torch

from rank_pool import RankPool, RankSpawner

RUN_SECONDS = 100  # of a case on ranks; compiling takes most of it
KERNEL_SECONDS, TEST_SECONDS = 120, 200  # of a test in pytest's own process, and of one with several cases on ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests in this folder without a CUDA device. Nothing interrupts a call of CUDA that hangs in pytest's own
    process, so the process is ended."""
    missing = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            seconds = TEST_SECONDS if "gpus" in getattr(item, "fixturenames", ()) else KERNEL_SECONDS
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(seconds, method="thread"))
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    """Two ranks if there are two GPUs, else one: NCCL does not let ranks share a GPU."""
    ranks = RankPool(RankSpawner({}), min(torch.cuda.device_count(), 2), limit=RUN_SECONDS)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def cpu() -> Iterator[RankPool]:
    """One rank on the CPU, for comparison."""
    ranks = RankPool(RankSpawner({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}), 1, limit=RUN_SECONDS)
    yield ranks
    ranks.close()
