"""Hosts with local disks, a corpus and a mirror in object storage."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from experiment.run_files.checkpoints import complete_checkpoints
from hosts import Cluster
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config
from s3_server import environment
from waiting import wait_until

PORT = 5000
STEPS = 40
PUT = """
import sys
from pathlib import Path
from experiment.storage import join, upload
from s3_server import new_bucket

bucket, folder = new_bucket(), Path(sys.argv[1])
for path in folder.rglob("*"):
    if path.is_file():
        upload(path, join(bucket, "text", str(path.relative_to(folder))))
print(bucket)
"""


@pytest.mark.soak
@pytest.mark.real_start
def test_a_host_is_replaced_by_an_empty_one(
    cluster: Cluster, pools: dict[int, RankPool], tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches a host that uses another host's copy, or none, and a run that cannot continue when a host and its run
    folder are lost. (Each host has a /tmp of its own.)"""
    first, second, server = cluster.hosts
    variables = environment(PORT) | {"AWS_ENDPOINT_URL": f"http://{server.address}:{PORT}"}
    put = [f"{name}={value}" for name, value in variables.items()]
    process = server.popen(sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(PORT))
    connect = f"import socket; socket.create_connection(('{server.address}', {PORT}))"
    wait_until(lambda: first.run(sys.executable, "-c", connect).returncode == 0, process)
    helpers = f"PYTHONPATH={Path(__file__).parents[1] / 'multiprocess'}"
    done = first.run("env", *put, helpers, sys.executable, "-c", PUT, str(wordpiece_corpus))
    assert done.returncode == 0, done.stderr
    bucket = done.stdout.strip()

    tree = run_config(tmp_path / "hosts", wordpiece_corpus, schedule__steps=STEPS, checkpoint__every_steps=2)
    tree["corpus"] = {"train": f"{bucket}/text", "cache": "/tmp/nvme/deepcloze"}
    tree["checkpoint"] |= {"mirror": f"{bucket}/run", "keep_last": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (tmp_path / "hostfile").write_text(f"{first.name} slots=1\n{second.name} slots=1\n", encoding="utf-8")
    command = ["env", "OMP_NUM_THREADS=1", *put, sys.executable, "-m", "launcher", "pretrain"]
    command += [f"--hostfile={tmp_path / 'hostfile'}", "--config", str(tmp_path / "run.yaml")]
    command += ["--env", ",".join(variables)]

    launch = first.popen(*command)
    wait_until(lambda: complete_checkpoints(tmp_path / "hosts" / "checkpoints"), launch)
    (tmp_path / "hosts" / "STOP").touch()
    assert launch.wait() == 75
    for host in (first, second):
        assert host.run("sh", "-c", "ls /tmp/nvme/deepcloze/*/text/*.arrow").returncode == 0
    shutil.rmtree(tmp_path / "hosts")
    second.reboot()
    reach = f"exec 3<>/dev/tcp/{second.address}/22"  # it has another MAC address
    wait_until(lambda: first.run("timeout", "5", "bash", "-c", reach).returncode == 0)
    assert second.run("ls", "/tmp/nvme").returncode != 0

    done = first.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in (tmp_path / "hosts" / "logs" / "rank-0.log").read_text(encoding="utf-8")
    assert second.run("sh", "-c", "ls /tmp/nvme/deepcloze/*/text/*.arrow").returncode == 0
    pools[2].run(pretrain_case, run_config(tmp_path / "plain", wordpiece_corpus, schedule__steps=STEPS))
    assert logged(tmp_path / "hosts", "step") == list(range(1, STEPS + 1))
    assert logged(tmp_path / "hosts") == pytest.approx(logged(tmp_path / "plain"), abs=1e-5)
