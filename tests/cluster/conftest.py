"""A cluster of three hosts on this machine; see hosts.py."""

import os
from collections.abc import Iterator, Mapping
from unittest import mock

import pytest

from hosts import Cluster, missing_requirement


@pytest.fixture(scope="package")
def _running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), count=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(
    _running_cluster: Cluster, handed_over: Mapping[str, str], request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Three hosts, node-1 to node-3, each connected and without processes. Unless the test is marked `real_start`,
    commands of deepcloze are forked from a process that has imported everything, until a host is rebooted."""
    if handed_over:
        for host in _running_cluster.hosts:
            request.getfixturevalue("fork_server").serve_namespaces(host.first_process)
    with mock.patch.dict(os.environ, handed_over):
        yield _running_cluster
    _running_cluster.reboot()
