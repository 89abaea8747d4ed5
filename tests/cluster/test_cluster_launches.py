"""Runs on several hosts give the losses of one host with as many ranks."""

import sys
from pathlib import Path

import pytest
import yaml

from hosts import Cluster, Host
from runs import logged, run_config, soak

DEEPCLOZE = (sys.executable, "-m", "launcher", "pretrain")


def write_hostfile(path: Path, hosts: list[Host], slots: int = 1) -> str:
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts), encoding="utf-8")
    return str(path)


def write_config(folder: Path, name: str, corpus: Path) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_config(folder / name, corpus)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ranks", [2, *soak(3)])
def test_hosts_give_the_losses_of_one_host(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path, ranks: int
) -> None:
    head = cluster.hosts[0]
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.hosts[:ranks])
    commands = {
        "one_host": [*DEEPCLOZE, f"--num_gpus={ranks}", "--oversubscribe"],
        "hosts": [*DEEPCLOZE, f"--hostfile={hostfile}"],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), f"--hostfile={hostfile}", "pretrain/run.py"],
    }
    for name, command in commands.items():
        command = ["env", "OMP_NUM_THREADS=1", *command]
        done = head.run(*command, "--config", write_config(tmp_path, name, wordpiece_corpus))
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    losses = {name: logged(tmp_path / name) for name in commands}
    assert losses["hosts"] == pytest.approx(losses["one_host"], abs=1e-5)
    assert losses["deepspeed"] == pytest.approx(losses["one_host"], abs=1e-5)
