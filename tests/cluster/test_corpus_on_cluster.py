"""Corpora built and cleaned by several hosts have the bytes of those of a single process."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

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
def source(tmp_path: Path, text_file: Path) -> Path:
    """About 40 splits of documents, each of which occurs many times."""
    text = text_file.read_text(encoding="utf-8")
    path = tmp_path / "source.txt"
    path.write_text(text * (40 * 2**20 // len(text)), encoding="utf-8")
    return path


@pytest.fixture
def build(tmp_path: Path, source: Path, wordpiece: Path) -> tuple[str, ...]:
    """Builds the corpus tmp_path/c; tmp_path/whole is the same one."""
    build_corpus(CorpusOptions(source=source, tokenizer=wordpiece, output=tmp_path / "whole", workers=2))
    flags = {"source": source, "tokenizer": wordpiece, "output": tmp_path / "c"}
    return (*DEEPCLOZE[:-1], "corpus", *(f"--{name}={value}" for name, value in flags.items()))


@pytest.fixture
def cleaning(tmp_path: Path, source: Path) -> tuple[str, ...]:
    """Cleans the documents to tmp_path/c, in two passes; tmp_path/whole has the same ones."""
    config = {"source": str(source), "output": str(tmp_path / "c"), "steps": [{"ftfy": {}}, {"line_dedup": {}}]}
    path = tmp_path / "clean.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = (*DEEPCLOZE[:-1], "clean", f"--config={path}")
    subprocess.run([*command, f"--output={tmp_path}/whole"], check=True)
    return command


def start_ray(host: Host, *flags: str) -> None:
    """Ray gives up on a node that has not started after 30 s, which a busy machine may need."""
    starts, late = 0, True
    while late and starts < 10:
        done = host.run(
            *(RAY, "start", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"),
            *(f"--node-ip-address={host.address}", *flags),
        )
        starts, late = starts + 1, "timed out during startup" in done.stderr
        if late:
            host.run(RAY, "stop", "--force")  # what has started of it
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.real_start
@pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is not installed")
@pytest.mark.parametrize(
    ("name", "finished"), [("build", "?" * 32 + ".json"), ("cleaning", "pass-0/*.json")], ids=["build", "cleaning"]
)
def test_ray_with_a_lost_and_a_late_host(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest, name: str, finished: str
) -> None:
    """Catches parts that are lost with a host, and hosts that join later and get none. `finished`: files of parts."""
    command = request.getfixturevalue(name)
    first, second, third = cluster.hosts
    address = f"{first.address}:6379"
    start_ray(first, "--head", "--port=6379", "--include-dashboard=false")
    start_ray(second, f"--address={address}")
    work = first.popen(
        *command, "--engine=ray", f"--ray_address={address}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(lambda: any("ray::_outcome" in line for line in second.processes()), work)
    wait_until(lambda: len(list((tmp_path / "c.partial").glob(finished))) >= 4, work)
    second.shut_down()
    with first.suspended(work):  # it hands out parts: some are left for the third host
        start_ray(third, f"--address={address}")
    wait_until(lambda: any("ray::_outcome" in line for line in third.processes()), work)
    printed, _ = work.communicate(timeout=SECONDS)
    assert work.returncode == 0, printed
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.real_start
def test_job_array(cluster: Cluster, tmp_path: Path, build: tuple[str, ...]) -> None:
    """Catches splits that no task of an array takes, and variables of SLURM that are read wrongly."""
    if missing := [program for program in ("slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / "slurm").mkdir()
    client = start_slurm(tmp_path / "slurm", cluster.hosts[:2])
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nexec {' '.join(build)} --engine=slurm --workers=1\n", encoding="utf-8")
    array = ("sbatch", "--wait", "--array=2-5", f"--output={tmp_path}/task-%a.log", str(script))
    work = cluster.hosts[0].popen(*client, *array, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = work.communicate(timeout=SECONDS)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("task-*.log")))
    assert work.returncode == 0, printed + logs
    assert contents(tmp_path / "c") == contents(tmp_path / "whole"), logs
