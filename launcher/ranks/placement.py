"""Placement of ranks: the slots of each host, from the devices, the hostfile and the launch options."""

import re
import shutil
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, PositiveInt

from experiment.config import Metavar, Section
from experiment.config.field_types import PathText
from experiment.errors import UserError
from launcher.hosts.hostfile import HOST_NAME, Hosts, Slots, expand_nodelist, is_this_machine
from launcher.hosts.machine import Devices
from launcher.ranks.environment import Launcher

# The programs that DeepSpeed starts, and those by which it recognizes an MPI or SLURM.
_PROGRAMS: Mapping[Launcher, tuple[str, ...]] = {
    "pdsh": ("pdsh",),
    "openmpi": ("mpirun", "ompi_info"),
    "mpich": ("mpirun",),
    "impi": ("mpirun",),
    "slurm": ("srun", "sinfo"),
    "mvapich": ("mpirun", "mpiname"),
}
_FILTER = re.compile(HOST_NAME + r"(?::(?P<slots>[0-9]+(?:,[0-9]+)*))?")


class PlacementOptions(Section):
    """Which machines and devices the ranks use."""

    hostfile: Annotated[PathText | None, Metavar("FILE")] = None
    """Machines to run on, one `NAME slots=N` per line; default: hosts of the SLURM, PBS or MPI job, or this machine."""

    num_gpus: Annotated[PositiveInt, Field(le=10**6)] | None = None
    """Ranks per machine; default: all slots of the hostfile, else one per GPU, or 1 on a CPU, where each rank is a
    process."""

    include: Annotated[str | None, Metavar("FILTER", separator="@")] = None
    """GPUs to use, as HOST[:SLOT,…][@HOST…], for example localhost:0,2; on a CPU, only their number counts."""

    exclude: Annotated[str | None, Metavar("FILTER", separator="@")] = None
    """GPUs not to use."""

    oversubscribe: bool = False
    """Allow more ranks than CPU cores."""


class HostOptions(PlacementOptions):
    """Options for starting ranks on other hosts."""

    launcher: Launcher = "pdsh"
    """Program that starts the ranks on other hosts: pdsh (ssh), an MPI, or srun in a SLURM job."""

    env: Annotated[str | None, Metavar("NAME[,NAME…]", separator=",")] = None
    """More environment variables to send to other hosts, by name; WANDB_*, HF_*, OMP_*, NCCL_*, GLOO_*, MLFLOW_*,
    PYTHON* and CUDA_* (except CUDA_VISIBLE_DEVICES), those of alerts, DS_ACCELERATOR and TORCHINDUCTOR_CACHE_DIR
    always are."""


def place_ranks(devices: Devices, options: PlacementOptions, hosts: Hosts | None = None) -> Slots:
    """Return the slots of all ranks, by host, in rank order.

    Without hosts (or if the only host is this machine) the slots are this machine's, under the name `localhost`. The
    default is all its GPUs, or one rank on a CPU, where slot numbers have no meaning beyond their count. With hosts,
    the slots are taken from the hostfile. `options.num_gpus` takes the first N slots of each host.

    Raises UserError for more ranks than devices, unless `options.oversubscribe` is set (CPU only: NCCL does not support
    two ranks on one GPU), and for filters and counts that contradict each other.
    """
    count, include, exclude = options.num_gpus, options.include, options.exclude
    if count is not None and (include is not None or exclude is not None):
        raise UserError("--num_gpus cannot be combined with --include or --exclude")
    given = None if hosts is None else name_localhost(_hostfile_slots(hosts, options))
    if given is not None and not is_local(given):
        return given
    if devices.problem is not None:
        raise UserError(devices.problem)
    slots = _own_slots(devices, options) if given is None else next(iter(given.values()))
    _check_capacity(slots, devices, options.oversubscribe)
    return {"localhost": slots}


def is_local(slots: Slots) -> bool:
    """Return whether all ranks run on this machine. slots: as `place_ranks` returns them."""
    return slots.keys() == {"localhost"}


def check_launcher(launcher: Launcher, slots: Slots, environ: Mapping[str, str]) -> None:
    """Raise UserError for slots that MPI or srun cannot start: they count ranks and do not choose GPUs."""
    if launcher == "pdsh":
        return
    for host, numbers in slots.items():
        if numbers != tuple(range(len(numbers))):
            raise UserError(
                f"--launcher {launcher} uses the first GPUs of a host, not GPUs {', '.join(map(str, numbers))} of "
                f"{host}; use --num_gpus, or --launcher pdsh"
            )
    if launcher == "slurm" and environ.get("SLURM_GPUS_PER_TASK"):
        raise UserError(
            "--launcher slurm: this job has --gpus-per-task, so each rank would see one GPU, as number 0; use "
            "--gpus-per-node, or --launcher pdsh"
        )
    if launcher == "slurm" and "SLURM_JOB_NODELIST" in environ:
        order = [host for host in expand_nodelist(environ["SLURM_JOB_NODELIST"]) if host in slots]
        if order != [host for host in slots if host in order]:
            raise UserError(
                f"--launcher slurm: srun starts rank 0 on {order[0]}, and the others in the order of "
                "SLURM_JOB_NODELIST; list the hosts in this order"
            )
    if launcher != "openmpi" and len(set(map(len, slots.values()))) > 1:
        raise UserError(f"--launcher {launcher} needs the same number of slots on every host; use --launcher pdsh")


def check_installed(launcher: Launcher) -> None:
    """Raise UserError if this machine lacks a program that starts ranks on other hosts."""
    for program in _PROGRAMS[launcher]:
        if shutil.which(program) is None:
            hint = "; sudo apt-get install pdsh" if launcher == "pdsh" else ", or not in PATH"
            raise UserError(f"--launcher {launcher}: {program} is not installed on this machine{hint}")


def name_localhost(slots: Slots) -> Slots:
    """Return the slots, under the name `localhost` if all are on this machine: it needs no ssh."""
    are_here = len(slots) == 1 and is_this_machine(next(iter(slots)))
    return {"localhost": next(iter(slots.values()))} if are_here else slots


def _hostfile_slots(hosts: Hosts, options: PlacementOptions) -> Slots:
    slots = {host: tuple(range(count)) for host, count in hosts.items()}
    return {
        host: _take_first(options.num_gpus, numbers, f"{host} has {len(numbers)} slots")
        for host, numbers in select_slots(slots, options.include, options.exclude).items()
    }


def _own_slots(devices: Devices, options: PlacementOptions) -> tuple[int, ...]:
    include, exclude = options.include, options.exclude
    if devices.kind == "cuda":
        numbers = select_slots({"localhost": devices.indices}, include, exclude)["localhost"]
        return _take_first(options.num_gpus, numbers, f"this machine has {len(numbers)} GPUs")
    if include is None and exclude is None:
        return tuple(range(options.num_gpus or 1))
    named = parse_filter(include, "--include").get("localhost") if include is not None else None
    available = tuple(sorted({*devices.indices, *(named or ())}))
    return select_slots({"localhost": available}, include, exclude)["localhost"]


def _take_first(count: int | None, numbers: tuple[int, ...], available: str) -> tuple[int, ...]:
    if count is not None and count > len(numbers):
        raise UserError(f"--num_gpus: {count} ranks requested, but {available}")
    return numbers[:count]


def _check_capacity(slots: tuple[int, ...], devices: Devices, oversubscribe: bool) -> None:
    if devices.kind == "cuda":
        if missing := [slot for slot in slots if slot not in devices.indices]:
            raise UserError(
                f"no GPU {missing[0]} on this machine: {len(slots)} ranks need one GPU each, available: "
                f"{', '.join(map(str, devices.indices))} (--oversubscribe shares CPU cores, not GPUs)"
            )
    elif len(slots) > len(devices.indices) and not oversubscribe:
        raise UserError(
            f"{len(slots)} ranks requested, but this machine has {len(devices.indices)} CPU cores; "
            "--oversubscribe runs them anyway, slowly"
        )


def parse_filter(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """Parse a filter such as `host1:0,2@host2` into host -> slots; None means all slots of the host. Raises UserError
    naming `flag` for a malformed filter and for a host that appears twice."""
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        if (match := _FILTER.fullmatch(part)) is None:
            raise UserError(f"{flag}: expected HOST[:SLOT[,SLOT…]][@HOST…] such as localhost:0,2, found {text!r}")
        if match["name"] in named:
            raise UserError(f"{flag}: {match['name']} appears twice in {text!r}")
        named[match["name"]] = (
            tuple(sorted({int(slot) for slot in match["slots"].split(",")})) if match["slots"] else None
        )
    return named


def select_slots(available: Slots, include: str | None, exclude: str | None) -> Slots:
    """Filter the available slots by `include` or `exclude`; hosts left without slots are dropped. Raises UserError if
    both filters are given, a filter names an unknown host or slot, or no slot remains."""
    if include is not None and exclude is not None:
        raise UserError("--include cannot be combined with --exclude")
    flag, text = ("--exclude", exclude) if include is None else ("--include", include)
    if text is None:
        return available
    named = {host: _matching_slots(host, slots, available, flag) for host, slots in parse_filter(text, flag).items()}
    if include is not None:
        chosen = {host: named[host] for host in available if host in named}
    else:
        chosen = {
            host: tuple(slot for slot in slots if slot not in named.get(host, ())) for host, slots in available.items()
        }
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise UserError(f"{flag} {text} leaves no slots")
    return chosen


def _matching_slots(host: str, slots: tuple[int, ...] | None, available: Slots, flag: str) -> tuple[int, ...]:
    if host not in available:
        raise UserError(f"{flag}: unknown host {host!r}; known: {', '.join(available)}")
    if missing := [slot for slot in slots or () if slot not in available[host]]:
        raise UserError(f"{flag}: {host} has no slot {missing[0]}; it has {', '.join(map(str, available[host]))}")
    return available[host] if slots is None else slots
