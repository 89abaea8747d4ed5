"""The test cluster itself: its hosts differ where hosts differ, and share what hosts share."""

from pathlib import Path

import pytest

from hosts import Cluster
from waiting import wait_until

pytestmark = pytest.mark.soak  # the other tests on several hosts need all this too


def test_hosts_reach_each_other_by_ssh(cluster: Cluster) -> None:
    for host in cluster.hosts:
        for other in cluster.hosts:
            done = host.run("ssh", "-o", "BatchMode=yes", other.name, "hostname")
            assert done.stdout.strip() == other.name, done.stderr


def test_a_host_has_its_own_processes_and_tmp(cluster: Cluster, tmp_path: Path) -> None:
    first, second, _ = cluster.hosts
    first.popen("sleep", "1000")
    wait_until(first.processes)
    first.run("touch", "/tmp/own", str(tmp_path / "shared"))
    assert [first.processes(), second.processes()] == [["sleep 1000"], []]
    assert second.run("test", "-e", "/tmp/own").returncode == 1
    assert second.run("test", "-e", str(tmp_path / "shared")).returncode == 0


def test_a_disconnected_host_is_silent_until_it_is_connected_again(cluster: Cluster) -> None:
    first, second, _ = cluster.hosts
    reach = ("ssh", "-o", "ConnectTimeout=2", second.name, "true")
    second.disconnect()
    assert first.run(*reach).returncode == 255
    second.reconnect()
    wait_until(lambda: first.run(*reach).returncode == 0)  # the address is looked up again after some time


def test_a_reboot_ends_all_processes_of_a_host(cluster: Cluster) -> None:
    first, second, _ = cluster.hosts
    second.popen("sleep", "1000")
    wait_until(lambda: second.processes() == ["sleep 1000"])
    second.reboot()
    assert second.processes() == []
    assert first.run("ssh", second.name, "hostname").stdout.strip() == second.name
