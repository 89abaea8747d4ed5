"""Pools of ranks."""

from collections.abc import Iterator

import pytest
import torch

from ranks import Nursery, RankPool

torch.set_num_threads(1)  # the models are so small that a second thread only costs


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankPool]]:
    """World size -> pool."""
    nursery = Nursery(tmp_path_factory.mktemp("ranks") / "output.log")
    pools = {size: RankPool(nursery, size) for size in (1, 2, 3)}
    yield pools
    for pool in pools.values():
        pool.close()
    nursery.close()
