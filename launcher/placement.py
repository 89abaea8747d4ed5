"""Which devices there are, and which ranks run where."""

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiment.errors import UserError
from launcher.hostfile import Host, Slots, parse_filter, select_slots

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Devices:
    """What this machine computes on: GPUs by their numbers, or else its CPU cores, counted from 0."""

    kind: DeviceKind
    numbers: tuple[int, ...]


def find_devices(environ: Mapping[str, str]) -> Devices:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, or the cores this process may use where there are none.

    DS_ACCELERATOR=cpu asks for the cores on a machine with GPUs too. Raises UserError for GPUs named in a way that
    DeepSpeed's launcher does not understand.
    """
    cores = Devices("cpu", tuple(range(cpu_cores())))
    if environ.get("DS_ACCELERATOR") == "cpu":
        return cores
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        return cores
    return Devices("cuda", tuple(range(count)) if visible is None else _gpu_numbers(visible)[:count])


def place_ranks(
    devices: Devices,
    hosts: tuple[Host, ...] | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    oversubscribe: bool = False,
) -> Slots:
    """The slots of every rank, by host, in the order of the ranks.

    Without hosts (or with this machine as the only one) the slots are this machine's, under the name `localhost`: all
    its GPUs by default; on a CPU one rank by default, and the numbers of slots only count. With hosts they are what the
    hostfile grants. `num_gpus` takes the first so many on each host.

    Raises UserError for more ranks than devices, unless `oversubscribe` allows it (on CPUs only: NCCL gives no two
    ranks the same GPU), and for filters and counts that contradict each other.
    """
    if num_gpus is not None and (include is not None or exclude is not None):
        raise UserError("--num_gpus counts slots, --include and --exclude name them: give one of them")
    if num_gpus is not None and num_gpus < 1:
        raise UserError(f"--num_gpus: expected at least 1, found {num_gpus}")
    slots: Slots
    if hosts is not None:
        granted = select_slots({host.name: tuple(range(host.slots)) for host in hosts}, include, exclude)
        slots = {
            host: _first(num_gpus, numbers, f"slots of {host} in the hostfile") for host, numbers in granted.items()
        }
        if not only_this_machine(slots):
            return slots
        slots = {"localhost": next(iter(slots.values()))}
    elif devices.kind == "cuda":
        granted = select_slots({"localhost": devices.numbers}, include, exclude)
        slots = {host: _first(num_gpus, numbers, "GPUs of this machine") for host, numbers in granted.items()}
    else:
        slots = _cores(devices, num_gpus, include, exclude)
    _check_local(slots["localhost"], devices, oversubscribe)
    return slots


def only_this_machine(slots: Slots) -> bool:
    """Whether all ranks run on the machine that this process runs on."""
    return len(slots) == 1 and is_this_machine(next(iter(slots)))


def is_this_machine(host: str) -> bool:
    """Whether a host name, or the address it resolves to, belongs to this machine."""
    if host == "localhost" or host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # possible for this machine's own addresses only
    except OSError:
        return False
    return True


def cpu_cores() -> int:
    """How many CPU cores this process may keep busy: its affinity, and the quota of a container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or no quota: 'max'
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def _cores(devices: Devices, num_gpus: int | None, include: str | None, exclude: str | None) -> Slots:
    if include is None and exclude is None:
        return {"localhost": tuple(range(num_gpus or 1))}
    named = parse_filter(include, "--include").get("localhost") if include is not None else None
    available = tuple(sorted({*devices.numbers, *(named or ())}))
    return select_slots({"localhost": available}, include, exclude)


def _first(count: int | None, numbers: tuple[int, ...], what: str) -> tuple[int, ...]:
    if count is not None and count > len(numbers):
        raise UserError(f"--num_gpus: {count} ranks asked for, more than the {len(numbers)} {what}")
    return numbers[:count]


def _check_local(slots: tuple[int, ...], devices: Devices, oversubscribe: bool) -> None:
    if devices.kind == "cuda":
        missing = [slot for slot in slots if slot not in devices.numbers]
        if missing:
            raise UserError(
                f"no GPU {missing[0]} on this machine: {len(slots)} ranks need one each and there are "
                f"{', '.join(map(str, devices.numbers))} (--oversubscribe shares cores of a CPU, not GPUs)"
            )
    elif len(slots) > len(devices.numbers) and not oversubscribe:
        raise UserError(
            f"{len(slots)} ranks asked for, more than the {len(devices.numbers)} CPU cores of this machine; "
            "--oversubscribe runs them all the same, slowly"
        )


def _gpu_numbers(visible: str) -> tuple[int, ...]:
    names = [name.strip() for name in visible.split(",")]
    for name in names:
        if not name.isdigit():
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible}: expected GPU numbers such as 0,1, found {name!r}; "
                "DeepSpeed's launcher takes nothing else"
            )
    return tuple(map(int, names))
