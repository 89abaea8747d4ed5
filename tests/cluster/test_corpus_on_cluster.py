"""Corpora built by several hosts have the bytes of one that a single process builds."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hosts import Cluster, Host
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from test_cluster_launches import DEEPCLOZE
from test_slurm import start_slurm
from waiting import wait_until

RAY = str(Path(sys.executable).with_name("ray"))
SECONDS = 400


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(tmp_path: Path, text_file: Path, wordpiece: Path) -> tuple[str, ...]:
    """Builds tmp_path/c from about 40 splits."""
    text = text_file.read_text(encoding="utf-8")
    (tmp_path / "source.txt").write_text(text * (40 * 2**20 // len(text)), encoding="utf-8")
    options = CorpusOptions(source=tmp_path / "source.txt", tokenizer=wordpiece, output=tmp_path / "whole", workers=2)
    build_corpus(options)
    flags = {"source": options.source, "tokenizer": wordpiece, "output": tmp_path / "c"}
    return (*DEEPCLOZE[:-1], "corpus", *(f"--{name}={value}" for name, value in flags.items()))


def start_ray(host: Host, *flags: str) -> None:
    done = host.run(
        *(RAY, "start", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"),
        *(f"--node-ip-address={host.address}", *flags),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.real_start
@pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is not installed")
def test_ray_with_a_lost_and_a_late_host(cluster: Cluster, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Catches splits that are lost with a host, and hosts that join later and get none."""
    first, second, third = cluster.hosts
    address = f"{first.address}:6379"
    start_ray(first, "--head", "--port=6379", "--include-dashboard=false")
    start_ray(second, f"--address={address}")
    build = first.popen(
        *command, "--engine=ray", f"--ray_address={address}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(lambda: any("ray::_outcome" in line for line in second.processes()))
    wait_until(lambda: len(list((tmp_path / "c.partial").glob("?" * 32 + ".json"))) >= 4)
    second.shut_down()
    start_ray(third, f"--address={address}")
    wait_until(lambda: any("ray::_outcome" in line for line in third.processes()))
    printed, _ = build.communicate(timeout=SECONDS)
    assert build.returncode == 0, printed
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.real_start
def test_job_array(cluster: Cluster, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Catches splits that no task of an array takes, and variables of SLURM that are read wrongly."""
    if missing := [program for program in ("slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / "slurm").mkdir()
    client = start_slurm(tmp_path / "slurm", cluster.hosts[:2])
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nexec {' '.join(command)} --engine=slurm --workers=1\n", encoding="utf-8")
    array = ("sbatch", "--wait", "--array=2-5", f"--output={tmp_path}/task-%a.log", str(script))
    build = cluster.hosts[0].popen(*client, *array, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = build.communicate(timeout=SECONDS)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("task-*.log")))
    assert build.returncode == 0, printed + logs
    assert contents(tmp_path / "c") == contents(tmp_path / "whole"), logs
