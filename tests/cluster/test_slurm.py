"""A job of SLURM on the test cluster: the hosts come from the job, and srun starts the ranks."""

import shutil
from pathlib import Path

import pytest

from hosts import Cluster, Host
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config
from test_cluster_launches import DEEPCLOZE, write_config
from waiting import wait_until

SLURM_CONF = """
ClusterName=test
SlurmctldHost={hosts[0].name}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName={names} CPUs=2
PartitionName=test Nodes=ALL Default=YES
"""


def start_slurm(folder: Path, hosts: list[Host]) -> tuple[str, ...]:
    """Start the daemons of SLURM, the controller on the first host. Returns how a command starts that uses them."""
    names = ",".join(host.name for host in hosts)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, hosts=hosts, names=names), encoding="utf-8")
    client = ("env", f"SLURM_CONF={folder}/slurm.conf")
    assert hosts[0].run(*client, "slurmctld", "-c").returncode == 0
    for host in hosts:
        (folder / f"spool-{host.name}").mkdir()
        assert host.run(*client, "slurmd", "-N", host.name).returncode == 0
    wait_until(lambda: hosts[0].run(*client, "sinfo", "--noheader", "--format=%T").stdout == "idle\n")
    return client


@pytest.mark.soak
def test_a_job_gives_the_losses_of_one_host(
    cluster: Cluster, pools: dict[int, RankPool], tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches hosts or ranks of a job that are read wrongly, and ranks without the environment of the launch."""
    if missing := [program for program in ("slurmctld", "slurmd", "salloc", "srun") if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / "slurm").mkdir()
    hosts = cluster.hosts[:2]
    job = (*start_slurm(tmp_path / "slurm", hosts), "salloc", "--nodes=2", "--ntasks-per-node=1")
    command = (*job, "env", "OMP_NUM_THREADS=1", *DEEPCLOZE, "--launcher=slurm")
    done = hosts[0].run(*command, "--config", write_config(tmp_path, "hosts", wordpiece_corpus))
    assert done.returncode == 0, done.stdout + done.stderr
    pools[2].run(pretrain_case, run_config(tmp_path / "one_host", wordpiece_corpus))
    assert logged(tmp_path / "hosts") == pytest.approx(logged(tmp_path / "one_host"), abs=1e-5)
    wait_until(lambda: not any("launcher" in line for host in hosts for line in host.processes()))
