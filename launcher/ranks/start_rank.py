"""Start one rank on its host: add the variables that depend on the host, then become `python -m pretrain.run`, or
with `--measure` a rank of the timed all-reduce of preflight.

DeepSpeed's launcher, or MPI or SLURM for it, runs this module once for each rank. The devices, cores and networks of
the host may differ from the machine that the launch was started on. glibc reads its settings when a program
starts, hence the exec, which keeps process id, exit code and signals. Imports no torch, to start at once.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, by srun: import from the repository, not from this folder
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from experiment.process.cpu_cores import cpu_cores, within_quota
from experiment.process.own_process import LAUNCH_VARIABLE
from launcher.hosts.host_guard import read_environment
from launcher.hosts.machine import guess_device
from launcher.hosts.probe import route_to
from launcher.ranks.environment import host_environment

MEASURE = "--measure"

# Of each source: the variables of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE.
_SOURCES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")


def main(argv: Sequence[str]) -> None:
    # DeepSpeed's launcher, which was started with them blocked, ends ranks by SIGTERM.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    module = "launcher.preflight.measure" if MEASURE in argv else "pretrain.run"
    environ = {**os.environ, **_of_launch(os.environ)}
    environ |= rank_variables(environ)
    ranks = int(environ.get("LOCAL_SIZE", "1"))
    interface = find_interface(environ) if int(environ.get("WORLD_SIZE", "1")) > ranks else None
    environ |= host_environment(environ, _cores_of_ranks(ranks), ranks, guess_device(environ), interface)
    os.execve(sys.executable, [sys.executable, "-u", "-m", module, *argv], environ)


def _cores_of_ranks(ranks: int) -> int:
    """Return the cores that the ranks of this host share. MPI and srun may have bound this one to a part of those that
    their own process, its parent, may use."""
    with suppress(OSError):  # SELinux may forbid it
        own, of_parent = (len(os.sched_getaffinity(process)) for process in (0, os.getppid()))
        if own < of_parent:
            return within_quota(min(own * ranks, of_parent))
    return cpu_cores()


def _of_launch(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables that the launch has sent to this host."""
    if (launch := environ.get(LAUNCH_VARIABLE)) is None:
        return {}
    try:
        return read_environment(launch)
    except FileNotFoundError:
        sys.exit("deepcloze: the launch that started this rank has ended")


def find_interface(environ: Mapping[str, str]) -> str | None:
    """Return the interface through which this host reaches the first one; None if that is unknown."""
    import psutil  # slow, and only several hosts need it

    try:
        _, own = route_to(environ["MASTER_ADDR"])
    except (OSError, KeyError):
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == own for entry in entries)), None)


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE of a rank that Open MPI, MVAPICH or srun has started; nothing
    for one that has them from DeepSpeed, as with pdsh, MPICH and Intel MPI.

    In a job of SLURM, its variables describe the job unless srun has started the process: MPI comes first.
    """
    if "RANK" in environ:
        return {}
    for source in _SOURCES:
        if all(name in environ for name in source):
            values = [environ[name].partition("(")[0].partition(",")[0] for name in source]  # tasks per node: 4(x2)
            return dict(zip(_NAMES, values, strict=True))
    return {}


if __name__ == "__main__":
    main(sys.argv[1:])
