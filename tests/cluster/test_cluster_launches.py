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


@pytest.mark.soak
def test_trials_of_autotune_use_all_hosts(cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path) -> None:
    """Catches a trial whose config or folder other hosts do not see, and one whose ranks stay there when it ends."""
    head = cluster.hosts[0]
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.hosts[:2])
    patient = (
        "from launcher.autotuning import autotune; from launcher import cli\n"
        "autotune.LIMIT_SECONDS = 3600; exit(cli.main())"
    )
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
