"""Which ranks run where: the slots of each host, from the devices, the hostfile and the launch options."""

from collections.abc import Sequence

from experiment.errors import UserError
from launcher.hosts.hostfile import Host, Slots
from launcher.hosts.machine import Devices, is_this_machine
from launcher.options import Launcher, PlacementOptions
from launcher.ranks.slot_filters import parse_filter, select_slots


def place_ranks(devices: Devices, options: PlacementOptions, hosts: Sequence[Host] | None = None) -> Slots:
    """The slots of all ranks, by host, in rank order.

    Without hosts (or if the only host is this machine) the slots are this machine's, under the name `localhost`. The
    default is all its GPUs, or one rank on a CPU, where slot numbers have no meaning beyond their count. With hosts,
    the slots are those of the hostfile. `options.num_gpus` takes the first N slots of each host.

    Raises UserError for more ranks than devices, unless `options.oversubscribe` is set (CPU only: NCCL does not support
    two ranks on one GPU), and for filters and counts that contradict each other.
    """
    count, include, exclude = options.num_gpus, options.include, options.exclude
    if count is not None and (include is not None or exclude is not None):
        raise UserError("--num_gpus cannot be combined with --include or --exclude")
    given = None if hosts is None else _hostfile_slots(hosts, options)
    if given is not None and not is_local(given):
        return given
    if devices.problem is not None:
        raise UserError(devices.problem)
    slots = _own_slots(devices, options) if given is None else next(iter(given.values()))
    _check_capacity(slots, devices, options.oversubscribe)
    return {"localhost": slots}


def is_local(slots: Slots) -> bool:
    """Whether all ranks run on this machine."""
    return len(slots) == 1 and is_this_machine(next(iter(slots)))


def check_launcher(launcher: Launcher, slots: Slots) -> None:
    """Raise UserError for slots that MPI or srun cannot start: they count ranks and do not choose GPUs."""
    if launcher == "pdsh":
        return
    for host, numbers in slots.items():
        if numbers != tuple(range(len(numbers))):
            raise UserError(
                f"--launcher {launcher} uses the first GPUs of a host, not GPUs {', '.join(map(str, numbers))} of "
                f"{host}; use --num_gpus, or --launcher pdsh"
            )
    if launcher != "openmpi" and len(set(map(len, slots.values()))) > 1:
        raise UserError(f"--launcher {launcher} needs the same number of slots on every host; use --launcher pdsh")


def name_localhost(slots: Slots) -> Slots:
    """The slots, under the name `localhost` if all are on this machine: it needs no ssh."""
    return {"localhost": next(iter(slots.values()))} if is_local(slots) else slots


def _hostfile_slots(hosts: Sequence[Host], options: PlacementOptions) -> Slots:
    slots = {host.name: tuple(range(host.slots)) for host in hosts}
    return {
        host: _take_first(options.num_gpus, numbers, f"the hostfile has {len(numbers)} slots for {host}")
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
        missing = [slot for slot in slots if slot not in devices.indices]
        if missing:
            raise UserError(
                f"no GPU {missing[0]} on this machine: {len(slots)} ranks need one GPU each, available: "
                f"{', '.join(map(str, devices.indices))} (--oversubscribe shares CPU cores, not GPUs)"
            )
    elif len(slots) > len(devices.indices) and not oversubscribe:
        raise UserError(
            f"{len(slots)} ranks requested, but this machine has {len(devices.indices)} CPU cores; "
            "--oversubscribe runs them anyway, slowly"
        )
