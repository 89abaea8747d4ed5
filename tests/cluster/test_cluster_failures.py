"""A launch over several hosts survives what happens to them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiment.checkpoints import complete_checkpoints
from hosts import Cluster, Host
from runs import logged, run_config
from test_cluster_launches import DEEPCLOZE, write_hostfile
from waiting import wait_until

STEPS = 400


def start(host: Host, tmp_path: Path, corpus: Path, hostfile: str) -> "subprocess.Popen[str]":
    tree = run_config(
        tmp_path / "run", corpus, schedule__steps=STEPS, checkpoint__every_steps=10, checkpoint__keep_last=2
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = ["env", "OMP_NUM_THREADS=1", *DEEPCLOZE, f"--hostfile={hostfile}", "--config", str(tmp_path / "run.yaml")]
    return host.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def attempts(tmp_path: Path) -> list[dict]:
    path = tmp_path / "run" / "launch.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(tmp_path: Path) -> int:
    found = complete_checkpoints(tmp_path / "run" / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def wait_for_progress(tmp_path: Path, process: "subprocess.Popen[str]") -> None:
    before = saved(tmp_path)
    wait_until(lambda: saved(tmp_path) > before, process)


@pytest.mark.parametrize("fault", ["processes", "link", "reboot"])
def test_training_continues_without_a_host_and_takes_it_back(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path, fault: str
) -> None:
    head, second, _ = cluster.hosts
    hostfile = write_hostfile(tmp_path / "hostfile", [head, second])
    process = start(head, tmp_path, wordpiece_corpus, hostfile)
    wait_for_progress(tmp_path, process)
    if fault == "processes":
        second.run("sh", "-c", "pkill -KILL python")
    elif fault == "link":
        second.disconnect()
        wait_until(lambda: len(attempts(tmp_path)) == 2, process)
        wait_for_progress(tmp_path, process)
        second.reconnect()
    else:
        second.shut_down()
        wait_until(lambda: len(attempts(tmp_path)) == 2, process)
        wait_for_progress(tmp_path, process)
        second.start({})
    output, _ = process.communicate()
    print(output)
    assert process.returncode == 0, output
