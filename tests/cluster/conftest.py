"""A cluster of three hosts on this machine; see hosts.py."""

import os
from collections.abc import Iterator, Mapping
from unittest import mock

import pytest

from hosts import Cluster, missing_requirement


@pytest.fixture(scope="package")
def _clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Cluster]]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), count=3) as cluster:
        yield _rebooted(cluster)


def _rebooted(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster as it has been started, then rebooted each time."""
    while True:
        yield cluster
        cluster.reboot()


@pytest.fixture
def cluster(
    _clusters: Iterator[Cluster], handed_over: Mapping[str, str], request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Three hosts, node-1 to node-3, each connected and without processes. Unless the test is marked `real_start`,
    commands of deepcloze are forked from a process that has imported everything, until a host is rebooted."""
    cluster = next(_clusters)
    if handed_over:
        for host in cluster.hosts:
            request.getfixturevalue("fork_server").serve_namespaces(host.first_process)
    with mock.patch.dict(os.environ, handed_over):
        yield cluster
