"""A plugin of pytest that runs tests/gpu on the simulated GPU: `pytest -p simulated_gpu.rehearsal tests/gpu`.

It finds mistakes in these tests before there is a GPU. Kernels of Triton's and compiled layers are not simulated: the
tests of these fail.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rank_pool
from pretrain.world import World
from simulated_gpu.gpu import simulated_gpu

_RANKS = 2
_SLOWER = 10.0  # than a GPU


def on_simulated_gpu(world: World, case: Callable[..., Any], *args: Any) -> Any:
    """Run a case. Raises AssertionError for mixed devices, and races."""
    with simulated_gpu() as gpu:
        result = case(world, *args)
    assert (gpu.mixed, gpu.races) == ([], [])
    return result


class SimulatedRankPool(rank_pool.RankPool):
    """Ranks on the simulated GPU, unless they are for the CPU."""

    def __init__(self, starter: rank_pool.RankSpawner, size: int, limit: float) -> None:
        super().__init__(starter, size, limit=_SLOWER * limit)
        self._on_cpu = starter._variables.get("DS_ACCELERATOR") == "cpu"

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        return super().run(case, *args) if self._on_cpu else super().run(on_simulated_gpu, case, *args)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests more time than conftest.py does."""
    for item in items:
        (seconds,) = next(item.iter_markers("timeout")).args
        item.add_marker(pytest.mark.timeout(_SLOWER * seconds, method="thread"), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test without ranks on the simulated GPU."""
    if "gpus" in getattr(item, "fixturenames", ()):
        return (yield)
    with simulated_gpu():
        return (yield)


rank_pool.RankPool = SimulatedRankPool  # type: ignore[misc]  # before conftest.py imports it
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: _RANKS
