"""Preflight names what is wrong with a host, and what fixes it."""

import json
import platform
import shlex
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from hosts import REPOSITORY, Cluster, Host
from launcher.preflight.bandwidth import LIMIT_SECONDS
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config
from test_cluster_launches import write_hostfile
from waiting import wait_until

DEEPCLOZE = ("env", "OMP_NUM_THREADS=1", sys.executable, "-m", "launcher")


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path / "run", wordpiece_corpus)), encoding="utf-8")
    return path


@pytest.fixture
def hostfile(cluster: Cluster, tmp_path: Path) -> str:
    return write_hostfile(tmp_path / "hostfile", cluster.hosts)


def preflight(head: Host, hostfile: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return head.run(*DEEPCLOZE, "preflight", f"--hostfile={hostfile}", *flags)


def assert_named(done: subprocess.CompletedProcess[str], *problems: str) -> None:
    """Preflight has failed, and named each of the problems with a command that fixes it."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for problem in problems:
        found = [number for number, line in enumerate(lines) if line.startswith(problem)]
        assert found, f"{problem!r} is not in\n{done.stdout}{done.stderr}"
        assert lines[found[0] + 1].startswith("    fix: ")


def bind(host: Host, source: Path, target: Path) -> None:
    """Show `source` in the place of `target` on one host only."""
    done = host.run("mount", "--bind", str(source), str(target))
    assert done.returncode == 0, done.stderr


def hide(host: Host, folder: Path) -> None:
    """Show an empty folder in the place of `folder` on one host only."""
    done = host.run("mount", "-t", "tmpfs", "tmpfs", str(folder))
    assert done.returncode == 0, done.stderr


def bind_text(host: Host, text: str, target: Path, scratch: Path) -> None:
    source = scratch / f"{host.name}-{target.name}"
    source.write_text(text, encoding="utf-8")
    bind(host, source, target)


def change_code(host: Host, scratch: Path) -> None:
    path = REPOSITORY / "pretrain" / "world.py"
    bind_text(host, f"{path.read_text(encoding='utf-8')}# changed\n", path, scratch)


def forget_key(host: Host, other: Host, scratch: Path) -> None:
    """Remove a host from those that another one knows."""
    path = Path("/etc/ssh/known_hosts")
    lines = host.run("cat", str(path)).stdout.splitlines(keepends=True)
    bind_text(host, "".join(line for line in lines if not line.startswith(f"{other.name},")), path, scratch)


def dist_info(library: str) -> Path:
    return Path(sysconfig.get_path("purelib")) / f"{library}-{metadata.version(library)}.dist-info"


def test_every_problem_of_a_host_is_named(
    cluster: Cluster, tmp_path: Path, hostfile: str, config: Path, wordpiece_corpus: Path
) -> None:
    """Catches a host that differs in one thing only, which is detected when ranks fail or, worse, do not."""
    head, different, unknown = cluster.hosts
    customize = tmp_path / "customize"  # on the path of each Python that ssh starts on this host
    customize.mkdir()
    (customize / "sitecustomize.py").write_text(
        "import platform, time\n"
        "now = time.time\n"
        "time.time = lambda: now() - 3600\n"
        "platform.python_version = lambda: '3.9.2'\n"
    )
    different.reboot({"PYTHONPATH": str(customize)})
    hide(different, dist_info("transformers"))
    change_code(different, tmp_path)
    bind_text(different, "{}", wordpiece_corpus / "manifest.json", tmp_path)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    hide(different, tmp_path / "run")
    forget_key(head, unknown, tmp_path)
    done = preflight(head, hostfile, f"--config={config}")
    name = different.name
    assert_named(
        done,
        f"{name}: Python: Python 3.9.2 at {sys.executable}, expected {platform.python_version()}",
        f"{name}: packages: transformers missing (expected {metadata.version('transformers')})",
        f"{name}: code: other Python files at {REPOSITORY}",
        f"{name}: files: {wordpiece_corpus}/manifest.json differs",
        f"{name}: run folder: {tmp_path}/run is not shared",
        f"{name}: clock: its clock is at least 35",
        f"{unknown.name}: ssh: its host key is unknown",
    )
    assert "preflight: 1 of 3 hosts passed" in done.stdout
    assert list((tmp_path / "run" / "logs").iterdir()) == []


def test_a_run_starts_without_the_hosts_that_failed(
    cluster: Cluster,
    pools: dict[int, RankPool],
    tmp_path: Path,
    hostfile: str,
    config: Path,
    wordpiece_corpus: Path,
) -> None:
    """Catches --allow_missing that starts ranks on a failed host, a launch over hosts that starts unchecked, and losses
    of two hosts that are not those of one host with as many ranks. Without the flag: `test_launch.py`.
    """
    head, broken, _ = cluster.hosts
    hide(broken, wordpiece_corpus)
    pretrain = (*DEEPCLOZE, "pretrain", f"--hostfile={hostfile}", f"--config={config}", "--schedule.steps=3")
    done = head.run(*pretrain, "--allow_missing")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{broken.name}: files: {wordpiece_corpus}/manifest.json cannot be read" in done.stderr
    assert "timing an all-reduce over 2 ranks" in done.stderr
    (attempt,) = map(json.loads, (tmp_path / "run" / "launch.jsonl").read_text().splitlines())
    assert attempt["hosts"] == {"node-1": [0], "node-3": [0]}
    pools[2].run(pretrain_case, run_config(tmp_path / "one_host", wordpiece_corpus, schedule__steps=3))
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "one_host"), abs=1e-5)


@pytest.mark.soak
def test_a_slow_host_is_found(cluster: Cluster, hostfile: str) -> None:
    """Catches a host with a bad cable, which would slow down every step of a run."""
    head, _, slow = cluster.hosts
    limit = "tc qdisc add dev eth0 root tbf rate 30mbit burst 64kbit latency 400ms"
    assert slow.run(*limit.split()).returncode == 0
    done = preflight(head, hostfile)
    assert_named(done, f"{slow.name}: speed: its network gives ")
    assert f"slowest network: {slow.name}" in done.stdout
    assert "preflight: 2 of 3 hosts passed" in done.stdout


@pytest.mark.soak
def test_a_slow_link_between_two_hosts_is_reported_for_both(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a slow host that passes because there is no third one to compare with."""
    head, slow, _ = cluster.hosts
    limit = "tc qdisc add dev eth0 root tbf rate 30mbit burst 64kbit latency 400ms"
    assert slow.run(*limit.split()).returncode == 0
    done = preflight(head, write_hostfile(tmp_path / "hostfile", cluster.hosts[:2]))
    assert_named(done, *(f"{host.name}: speed: " for host in (head, slow)))
    assert "between node-1 and node-2, whichever of them is slow" in done.stdout


@pytest.mark.soak
def test_hosts_that_do_not_answer_are_told_apart(cluster: Cluster, tmp_path: Path, hostfile: str) -> None:
    """Catches one message for all failures of ssh, of which each has another remedy."""
    head, refusing, forbidden = cluster.hosts
    ssh_config = head.run("cat", "/etc/ssh/ssh_config").stdout
    bind_text(head, f"{ssh_config}Host {refusing.name}\n  Port 2222\n", Path("/etc/ssh/ssh_config"), tmp_path)
    bind_text(forbidden, "", Path("/etc/ssh/key.pub"), tmp_path)
    refused = preflight(head, hostfile)
    assert_named(
        refused,
        f"{refusing.name}: ssh: connection refused",
        f"{forbidden.name}: ssh: permission denied",
    )


@pytest.mark.soak
def test_silent_hosts_and_hosts_without_python_are_named(cluster: Cluster, hostfile: str, tmp_path: Path) -> None:
    head, silent, bare = cluster.hosts
    silent.disconnect()
    hide(bare, Path(sys.prefix).resolve())
    (tmp_path / "other").write_text(f"{Path(hostfile).read_text()}no-such-host slots=1\n")
    done = preflight(head, str(tmp_path / "other"))
    assert_named(
        done,
        f"{silent.name}: ssh: no ",
        f"{bare.name}: Python: there is no Python at {sys.executable}",
        "no-such-host: ssh: its name cannot be resolved",
    )


@pytest.mark.soak
def test_ranks_meet_at_a_port_that_is_free_there(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a port that is chosen on the launching machine, and in use where the ranks meet."""
    first, second, login = cluster.hosts
    ports = range(40000, 40064)
    login.run("sh", "-c", f"echo {ports[0]} {ports[-1]} > /proc/sys/net/ipv4/ip_local_port_range")
    listen = "import socket, time; s = [socket.create_server(('', p)) for p in range(40000, 40064)]; time.sleep(1000)"
    first.popen(sys.executable, "-c", listen)
    wait_until(lambda: f":{ports[-1]} " in first.run("ss", "-ltn").stdout)
    done = preflight(login, write_hostfile(tmp_path / "hostfile", [first, second]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-reduce of" in done.stdout


@pytest.mark.soak
def test_a_killed_preflight_leaves_no_ranks_behind(cluster: Cluster, tmp_path: Path) -> None:
    """Catches ranks on other hosts that keep devices and port until their timeout."""
    head, waiting, stopped = cluster.hosts
    hostfile, pid = write_hostfile(tmp_path / "hostfile", [waiting, stopped]), tmp_path / "pid"
    command = shlex.join([*DEEPCLOZE, "preflight", f"--hostfile={hostfile}"])
    process = head.popen("sh", "-c", f"echo $$ > {pid}; exec {command}", stdout=subprocess.DEVNULL)
    wait_until(lambda: all(ranks(host) for host in (waiting, stopped)), process)
    stopped.run("kill", "-STOP", *ranks(stopped))  # the other rank now waits until its timeout
    killed_at = time.monotonic()
    head.run("kill", "-KILL", pid.read_text().strip())
    wait_until(lambda: not ranks(waiting))
    assert time.monotonic() - killed_at < LIMIT_SECONDS / 2


def ranks(host: Host) -> list[str]:
    """The process ids of the ranks that preflight has started on a host."""
    return host.run("pgrep", "-f", "launcher.preflight.measure").stdout.split()
