"""The tutorial on clusters runs as it is written, on two hosts with one CPU slot each."""

import re
import sys
from contextlib import closing
from pathlib import Path

import pytest

from documented import CLUSTER_TUTORIAL, Command, Terminal, commands, read_page, write_configs
from documented_files import write_texts
from hosts import Cluster, Host

# What starts something on the hosts; the other commands only read and write the shared disk.
ON_HOSTS = ("for host", ".", "deepcloze preflight", "deepcloze pretrain", "deepcloze logs", "deepcloze status")


@pytest.mark.soak
def test_the_tutorial_runs(cluster: Cluster, tmp_path: Path, text_file: Path) -> None:
    """Catches a tutorial with a command or a config that does not work."""
    data = tmp_path / "data"
    (data / "deepcloze").mkdir(parents=True)
    (data / "deepcloze/.venv").symlink_to(sys.prefix)
    write_texts(data, text_file.read_text(encoding="utf-8").splitlines())
    here = {"/data": str(data)}
    write_configs(CLUSTER_TUTORIAL, data, here)
    (hostfile,) = re.findall(r"^# hosts\n((?:node-.*\n)+)", read_page(CLUSTER_TUTORIAL), re.MULTILINE)
    (data / "hosts").write_text(hostfile.replace("slots=4", "slots=1"), encoding="utf-8")
    with closing(Terminal(data, here)) as terminal:
        for command in commands(CLUSTER_TUTORIAL):
            if command.text.startswith(ON_HOSTS):
                run_on(cluster.hosts[0], command, data)
            else:
                terminal.run(command)
    assert (data / "my-bert/model.safetensors").is_file()


def run_on(host: Host, command: Command, data: Path) -> None:
    """Run a command on a host, in a shell in which the first commands of the page have run."""
    shell = f"export OMP_NUM_THREADS=1; . {data}/deepcloze/.venv/bin/activate; cd {data}"
    done = host.run("bash", "-ec", f"{shell}; {command.text.replace('/data', str(data))}")
    assert done.returncode == 0, f"{command.text}\n{done.stdout}\n{done.stderr}"
