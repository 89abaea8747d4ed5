"""A cluster of three hosts on this machine; see hosts.py."""

from collections.abc import Iterator

import pytest

from hosts import Cluster, missing_requirement


@pytest.fixture(scope="package")
def _running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), count=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(_running_cluster: Cluster) -> Iterator[Cluster]:
    """Three hosts, node-1 to node-3, each connected and without processes."""
    yield _running_cluster
    _running_cluster.reboot()
