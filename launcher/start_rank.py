"""Start one rank on its host: add the variables that depend on the host, then become `python -m pretrain.run`.

DeepSpeed's launcher, or MPI or SLURM for it, runs this module once for each rank. The devices, cores and networks of
the host may differ from those of the machine that the launch was started on. glibc reads its settings when a program
starts, hence the exec, which keeps process id, exit code and signals. Imports no torch, to start at once.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, by srun: import from the repository, not from this folder
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

import os
from collections.abc import Mapping, Sequence

import psutil

from experiment.launch_variable import LAUNCH_VARIABLE
from launcher.hosts.addresses import route_to
from launcher.hosts.host_guard import read_environment
from launcher.hosts.machine import cpu_cores, guess_device
from launcher.ranks.environment import host_environment, network_interface
from launcher.ranks.rank_variables import rank_variables


def main(argv: Sequence[str], module: str = "pretrain.run") -> None:
    environ = {**os.environ, **_of_launch(os.environ)}
    environ |= rank_variables(environ)
    ranks = int(environ.get("LOCAL_SIZE", "1"))
    environ |= host_environment(environ, cpu_cores(), ranks, guess_device(environ))
    if int(environ.get("WORLD_SIZE", "1")) > ranks:
        environ |= _network(environ)
    os.execve(sys.executable, [sys.executable, "-u", "-m", module, *argv], environ)


def _of_launch(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that the launch has sent to this host."""
    launch = environ.get(LAUNCH_VARIABLE)
    if launch is None:
        return {}
    try:
        return read_environment(launch)
    except FileNotFoundError:
        sys.exit("deepcloze: the launch that started this rank has ended")


def _network(environ: Mapping[str, str]) -> dict[str, str]:
    """The interface through which this host reaches the first one; nothing if that is unknown."""
    try:
        _, own = route_to(environ["MASTER_ADDR"])
    except (OSError, KeyError):
        return {}
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    return network_interface(environ, addresses, own)


if __name__ == "__main__":
    main(sys.argv[1:])
