"""The templates in hostfiles/ for batch systems."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from waiting import LIMIT, wait_until

HOSTFILES = Path(__file__).parents[3] / "hostfiles"


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment with a `deepcloze` that exits with CODE, on a signal with 75, and a `scontrol`."""
    for name, body in {
        "deepcloze": 'trap "exit 75" TERM\ntouch started\n[ -n "$CODE" ] && exit $CODE\nwhile :; do sleep 0.05; done',
        "scontrol": 'echo "$@" > requeued',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "CODE": ""}


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_slurm_job_that_was_stopped_early_is_queued_again(
    tmp_path: Path, programs: dict[str, str], code: int
) -> None:
    """Catches a job that is queued for ever after a failure, and one that is not queued again."""
    command = ["bash", str(HOSTFILES / "slurm.sbatch"), "my-run.yaml"]
    job = subprocess.run(command, cwd=tmp_path, env=programs | {"CODE": str(code)}, timeout=LIMIT)
    assert job.returncode == code
    assert (tmp_path / "requeued").exists() == (code == 75)


def test_the_time_limit_of_a_slurm_job_saves_and_queues_again(tmp_path: Path, programs: dict[str, str]) -> None:
    """Catches a signal that bash keeps from deepcloze, and its exit code lost on the way."""
    command = ["bash", str(HOSTFILES / "slurm.sbatch"), "my-run.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=programs, text=True) as job:
        wait_until((tmp_path / "started").exists, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(LIMIT) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_the_kubernetes_job_starts_one_deepcloze() -> None:
    """Catches a manifest that cannot be read, ranks that every worker starts, and sshd without host keys."""
    job = yaml.safe_load((HOSTFILES / "kubernetes.yaml").read_text(encoding="utf-8"))
    replicas = job["spec"]["mpiReplicaSpecs"]
    containers = {name: spec["template"]["spec"]["containers"][0] for name, spec in replicas.items()}
    assert containers["Launcher"]["command"][:2] == ["deepcloze", "pretrain"]
    assert containers["Worker"]["command"] == ["sh", "-c", "ssh-keygen -A && exec /usr/sbin/sshd -De"]
    assert containers["Worker"]["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
