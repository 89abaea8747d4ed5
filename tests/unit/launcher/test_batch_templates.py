"""The templates in hostfiles/ for batch systems."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from experiment.files import REPOSITORY
from waiting import LIMIT, wait_until

HOSTFILES = REPOSITORY / "hostfiles"
START_RANK = REPOSITORY / "launcher" / "ranks" / "start_rank.py"


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment with a `deepcloze` that exits with CODE, or with 75 once it has the signals in SIGNALS, and a
    `scontrol`."""
    for name, body in {
        "deepcloze": 'for name in TERM USR1; do trap "echo $name >> got" $name; done\ntouch got started\n'
        '[ -n "$CODE" ] && exit $CODE\nwhile [ "$(echo $(cat got))" != "$SIGNALS" ]; do sleep 0.05; done; exit 75',
        "scontrol": 'echo "$@" > requeued',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "CODE": ""}


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(
    tmp_path: Path, programs: dict[str, str], code: int
) -> None:
    """Catches a job that is queued forever after a failure, on a full disk, or although its user has stopped it."""
    command = ["bash", str(HOSTFILES / "slurm.sbatch"), "my-run.yaml"]
    job = subprocess.run(command, cwd=tmp_path, env=programs | {"CODE": str(code)}, timeout=LIMIT)
    assert job.returncode == code
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("signals", "again"), [("USR1", True), ("TERM", False), ("USR1 TERM", True)])
def test_only_the_time_limit_of_a_slurm_job_queues_it_again(
    tmp_path: Path, programs: dict[str, str], signals: str, again: bool
) -> None:
    """Catches a signal that bash keeps from deepcloze, its exit code lost on the way, a job that cannot be cancelled,
    and one that is not queued again, or killed, because it still saves at its time limit."""
    command = ["bash", str(HOSTFILES / "slurm.sbatch"), "my-run.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=programs | {"SIGNALS": signals}, text=True) as job:
        wait_until((tmp_path / "started").exists, job)
        for name in signals.split():
            job.send_signal(signal.Signals[f"SIG{name}"])
            wait_until(lambda name=name: name in (tmp_path / "got").read_text())
        assert job.wait(LIMIT) == 75
    assert [path.read_text() for path in tmp_path.glob("requeued")] == ["requeue 17\n"] * again


def test_the_kubernetes_job_starts_one_deepcloze() -> None:
    """Catches a manifest that cannot be read, ranks that every worker starts, and sshd without host keys,
    or as the user of the image."""
    job = yaml.safe_load((HOSTFILES / "kubernetes.yaml").read_text(encoding="utf-8"))
    replicas = job["spec"]["mpiReplicaSpecs"]
    containers = {name: spec["template"]["spec"]["containers"][0] for name, spec in replicas.items()}
    assert all(spec["template"]["spec"]["securityContext"] == {"runAsUser": 0} for spec in replicas.values()), "for ssh"
    assert containers["Launcher"]["args"][0] == "pretrain"
    assert "command" not in containers["Launcher"], "the entrypoint has tini"
    assert containers["Worker"]["command"] == ["sh", "-c", "ssh-keygen -A && exec /usr/sbin/sshd -De -o StrictModes=no"]
    assert containers["Worker"]["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]


@pytest.mark.parametrize(
    "command",
    [
        f"python -u {START_RANK} --config my-run.yaml",
        "python -u -m deepspeed.launcher.launch --no_python launcher.ranks.start_rank",
        "python -u -m pretrain.run --local_rank=0",
    ],
)
def test_the_workers_of_a_kubernetes_job_outlive_their_ranks(tmp_path: Path, command: str) -> None:
    """Catches ranks that are killed before they have saved, because sshd ends as soon as the job is deleted, and a
    worker that waits for itself."""
    job = yaml.safe_load((HOSTFILES / "kubernetes.yaml").read_text(encoding="utf-8"))
    pods = {name: spec["template"]["spec"] for name, spec in job["spec"]["mpiReplicaSpecs"].items()}
    seconds = {name: pod["terminationGracePeriodSeconds"] for name, pod in pods.items()}
    assert seconds["Worker"] > seconds["Launcher"] >= 600, "to save a checkpoint"
    shell, option, script = pods["Worker"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    processes = tmp_path / "proc"
    rank = processes / "7" / "cmdline"
    rank.parent.mkdir(parents=True)
    rank.write_bytes(command.replace(" ", "\0").encode())
    hook = [shell, option, script.replace("/proc/", f"{processes}/").replace("sleep 1", "touch waiting; sleep 0.1")]
    with subprocess.Popen(hook, cwd=tmp_path) as waiting:
        own = processes / str(waiting.pid) / "cmdline"
        own.parent.mkdir()
        own.write_bytes("\0".join(hook).encode())
        wait_until((tmp_path / "waiting").exists, waiting)
        rank.unlink()
        assert waiting.wait(LIMIT) == 0
