"""Runs on several hosts give the losses of one host with as many ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hosts import Cluster, Host
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config
from waiting import wait_until

DEEPCLOZE = (sys.executable, "-m", "launcher", "pretrain")
# Code for `patched`, for launches whose network and cores preflight need not measure, as in the test named below.
UNMEASURED = """
import sys
if "launcher" in sys.orig_argv:
    from launcher.preflight import run
    run._measure = lambda *_: (None, None)
"""


def write_hostfile(path: Path, hosts: list[Host], slots: int = 1) -> str:
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts), encoding="utf-8")
    return str(path)


def write_config(folder: Path, name: str, corpus: Path) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_config(folder / name, corpus)), encoding="utf-8")
    return str(path)


@pytest.mark.soak  # outside soak, `test_a_run_starts_without_the_hosts_that_failed` compares losses of two hosts
@pytest.mark.real_start
@pytest.mark.parametrize("launcher", ["deepcloze", "deepspeed"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_hosts_give_the_losses_of_one_host(
    cluster: Cluster, pools: dict[int, RankPool], tmp_path: Path, wordpiece_corpus: Path, launcher: str, ranks: int
) -> None:
    head = cluster.hosts[0]
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.hosts[:ranks])
    commands = {
        "deepcloze": [*DEEPCLOZE, f"--hostfile={hostfile}"],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), f"--hostfile={hostfile}", "pretrain/run.py"],
    }
    command = ["env", "OMP_NUM_THREADS=1", *commands[launcher]]
    done = head.run(*command, "--config", write_config(tmp_path, "hosts", wordpiece_corpus))
    assert done.returncode == 0, done.stdout + done.stderr
    pools[ranks].run(pretrain_case, run_config(tmp_path / "one_host", wordpiece_corpus))
    assert logged(tmp_path / "hosts") == pytest.approx(logged(tmp_path / "one_host"), abs=1e-5)


@pytest.mark.soak
def test_trials_of_autotune_use_all_hosts(cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path) -> None:
    """Catches a trial whose config or folder other hosts do not see, and one whose ranks stay there when it ends."""
    head = cluster.hosts[0]
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.hosts[:2])
    patient = "from launcher import autotune, cli\nautotune.LIMIT_SECONDS = 3600; exit(cli.main())"
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-c", patient, "pretrain", f"--hostfile={hostfile}"]
    done = head.run(*command, "--autotune", "--config", write_config(tmp_path, "run", wordpiece_corpus))
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split("│")[1:-1] for line in done.stderr.splitlines() if "│" in line]
    assert len(table) > 1, done.stderr
    (chosen,) = (row for row in table if "chosen" in row[-1])
    run = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert run["batch"]["microbatch_tokens"] == int(chosen[0].replace(",", ""))
    assert len(logged(tmp_path / "run")) == 6
    assert not (tmp_path / "run" / "logs" / "autotune").exists()


@pytest.mark.soak
def test_hosts_may_have_ipv6_addresses_only(
    cluster: Cluster, pools: dict[int, RankPool], tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches addresses, interfaces or sockets of IPv4 where the network has none."""
    hosts = cluster.hosts[:2]
    names = tmp_path / "etc-hosts"
    names.write_text("".join(f"fd77::{number} {host.name}\n" for number, host in enumerate(hosts, start=1)))
    for number, host in enumerate(hosts, start=1):
        for command in (
            f"ip address add fd77::{number}/64 dev eth0 nodad",
            f"ip address delete {host.address}/24 dev eth0",
            f"mount --bind {names} /etc/hosts",
        ):
            assert host.run(*command.split()).returncode == 0
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    command = ("env", "OMP_NUM_THREADS=1", *DEEPCLOZE, f"--hostfile={hostfile}")
    done = hosts[0].run(*command, "--config", write_config(tmp_path, "hosts", wordpiece_corpus))
    assert done.returncode == 0, done.stdout + done.stderr
    pools[2].run(pretrain_case, run_config(tmp_path / "one_host", wordpiece_corpus))
    assert logged(tmp_path / "hosts") == pytest.approx(logged(tmp_path / "one_host"), abs=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(("launcher", "version"), [("openmpi", "Open MPI"), ("mpich", "HYDRA")])
def test_mpi_gives_the_losses_of_one_host(
    cluster: Cluster,
    pools: dict[int, RankPool],
    tmp_path: Path,
    wordpiece_corpus: Path,
    launcher: str,
    version: str,
) -> None:
    """Catches ranks that MPI starts wrongly or without the environment of the launch, and some that stay."""
    programs = install_mpirun(tmp_path / "bin", launcher, version)
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.hosts[:2])
    variables = ("OMP_NUM_THREADS=1", f"PATH={programs}:{os.environ['PATH']}", *AS_ROOT)
    command = ["env", *variables, *DEEPCLOZE, f"--hostfile={hostfile}", f"--launcher={launcher}"]
    done = cluster.hosts[0].run(*command, "--config", write_config(tmp_path, "hosts", wordpiece_corpus))
    assert done.returncode == 0, done.stdout + done.stderr
    pools[2].run(pretrain_case, run_config(tmp_path / "one_host", wordpiece_corpus))
    assert logged(tmp_path / "hosts") == pytest.approx(logged(tmp_path / "one_host"), abs=1e-5)
    wait_until(lambda: not any(host.processes() for host in cluster.hosts))


AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")


def install_mpirun(folder: Path, launcher: str, version: str) -> Path:
    """A folder whose `mpirun` is the one of this MPI, of several that may be installed; skips the test if none is."""
    for name in (f"mpirun.{launcher}", "mpirun"):  # Debian has both
        path = shutil.which(name)
        if path is not None and version in subprocess.run([path, "--version"], capture_output=True, text=True).stdout:
            folder.mkdir()
            (folder / "mpirun").write_text(f'#!/bin/sh\nexec {path} "$@"\n', encoding="utf-8")
            (folder / "mpirun").chmod(0o755)
            return folder
    pytest.skip(f"needs mpirun of {launcher}")
