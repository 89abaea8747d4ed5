import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment.process.cpu_cores import cpu_cores, within_quota
from experiment.process.signals import HANDLED_SIGNALS, WARNING_SIGNALS, signals_blocked
from launcher.ranks import start_rank
from launcher.ranks.environment import GLIBC_TUNABLES, host_environment

ROOT = Path(__file__).parents[4]

# Stands for pretrain.run: it prints what it was started with.
RUN = """
import json, os, signal, sys
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "environ": dict(os.environ), "blocked": blocked}))
sys.exit(75)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").touch()
    (tmp_path / "pretrain" / "run.py").write_text(RUN)
    return tmp_path


@pytest.mark.parametrize(("world_size", "interface"), [(2, None), (4, "lo")])
def test_a_rank_runs_in_the_environment_of_its_host(folder: Path, world_size: int, interface: str | None) -> None:
    """Catches settings of the launching machine, a lost argument, a process that the launcher loses track of, one
    that DeepSpeed's launcher cannot end by SIGTERM, and connections that are not on the interface of the route."""
    set_here = ("OMP_NUM_THREADS", "GLIBC_TUNABLES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environ = {name: value for name, value in os.environ.items() if name not in set_here}
    environ |= {"PYTHONPATH": str(ROOT), "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "RANK": "1"}
    environ |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-u", "-m", "launcher.ranks.start_rank", "--local_rank=1", "--run.dir=a b"]
    with signals_blocked(HANDLED_SIGNALS):  # as DeepSpeed's launcher
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75
    seen = json.loads(output)
    assert seen["pid"] == process.pid
    assert seen["argv"] == ["--local_rank=1", "--run.dir=a b"]
    assert seen["blocked"] == sorted((*WARNING_SIGNALS, signal.SIGHUP))
    added = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // 2)), "GLIBC_TUNABLES": GLIBC_TUNABLES}
    assert {name: seen["environ"].get(name) for name in environ | added} == environ | added
    assert seen["environ"].get("GLOO_SOCKET_IFNAME") == interface


@pytest.mark.parametrize(
    ("own", "of_parent", "ranks", "threads"),
    [(8, 8, 2, 4), (32, 64, 2, 32), (1, 64, 2, 1), (32, 64, 4, 16)],
    ids=["not bound", "bound by srun", "bound to a core", "two bound to a socket"],
)
def test_cores_that_a_rank_is_bound_to_are_not_divided_again(
    monkeypatch: pytest.MonkeyPatch, own: int, of_parent: int, ranks: int, threads: int
) -> None:
    """Catches ranks of MPI or srun that use a part of their cores, or more than there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(own if pid == 0 else of_parent)))
    monkeypatch.setattr("experiment.process.cpu_cores.within_quota", lambda cores: cores)
    monkeypatch.setattr(start_rank, "within_quota", lambda cores: cores)
    environ = host_environment({}, start_rank._cores_of_ranks(ranks), ranks, "cpu")
    assert environ["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_that_is_bound_to_a_core_finds_those_of_its_parent() -> None:
    """Catches ranks of MPI or srun that divide the core which each of them has."""
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from launcher.ranks.start_rank import _cores_of_ranks; print(*map(_cores_of_ranks, (1, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["1", str(within_quota(2))]


def test_the_interface_is_that_of_the_route_to_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gloo on the interface of a container bridge."""
    addresses = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "ib0": ["10.1.0.7"]}
    entries = {name: [SimpleNamespace(address=each) for each in found] for name, found in addresses.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: entries)
    ways = {"node-1": ("10.1.0.1", "10.1.0.7"), "node-9": ("10.2.0.1", "10.2.0.7")}
    monkeypatch.setattr(start_rank, "route_to", ways.__getitem__)
    assert start_rank.find_interface({"MASTER_ADDR": "node-1"}) == "ib0"
    assert start_rank.find_interface({"MASTER_ADDR": "node-9"}) is None
    assert start_rank.find_interface({}) is None


def test_starting_a_rank_imports_little() -> None:
    """Catches a start that takes longer: pretrain.run imports torch and pydantic again."""
    slow = ("torch", "transformers", "pydantic", "psutil", "importlib.metadata")
    code = f"import sys, launcher.ranks.start_rank; sys.exit(any(name in sys.modules for name in {slow}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
