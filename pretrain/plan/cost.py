"""Time, energy and cost of a run: FLOPs and bytes on a device, at a stated utilisation, bandwidth, power and price.

The device is this machine's, or one that the user names. Takes no device.
"""

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TIMEOUT = 10.0  # seconds, for nvidia-smi
_GIB = 1 << 30
# Of a capability below 8.0. Newer ones have similar names: RTX 2050, RTX 2000 Ada Generation, MX570.
_OLDER_GPUS = re.compile(
    r"\b([KMPTV]\d|C\d{4}|MX\d[1-5]0|GT|TITAN|RTX 20[678]0|(Tesla|Quadro)(?!.*\b[ABHL]\d))", re.IGNORECASE
)
# Of a GPU's memory, at least and at most: a card sold with 80 GiB has 79.2 to 79.6; the CUDA context, NCCL's buffers,
# workspaces of cuBLAS and fragmentation take 1.5 to 3 GiB. Figures from practice, not measured with deepcloze.
_RESERVED_SHARES = 0.005, 0.01
_RESERVED_BYTES = 3 * _GIB // 2, 3 * _GIB


@dataclass(frozen=True)
class Device:
    """The device of a rank. None: unknown."""

    name: str  # 'cpu', or as `torch.cuda.get_device_name` gives it
    memory: int | None  # bytes
    watts: float | None

    @property
    def is_gpu(self) -> bool:
        return self.name.lower() != "cpu"

    @property
    def capability(self) -> tuple[int, int] | None:
        """The CUDA capability, as far as kernels are chosen by it: an A100's, unless the GPU is known to be older."""
        return None if not self.is_gpu else (7, 0) if _OLDER_GPUS.search(self.name) else (8, 0)

    @property
    def reserve(self) -> tuple[int, int]:
        """Bytes of the memory that training cannot use, at least and at most. Of a CPU's memory, none."""
        if not self.is_gpu:
            return 0, 0
        low, high = (
            int(share * (self.memory or 0)) + size
            for share, size in zip(_RESERVED_SHARES, _RESERVED_BYTES, strict=True)
        )
        return low, high


UNKNOWN_GPU = Device("unknown GPU", None, None)


def local_gpu() -> Device:
    """Return the first GPU that nvidia-smi lists, with its power limit; `UNKNOWN_GPU` if it lists none. A GPU that
    shares the memory of its host has none of its own: it is unknown. So are the figures of a part of a GPU (MIG)."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,power.limit", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
        name, mebibytes, watts = listed.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return UNKNOWN_GPU
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        return Device(f"{name} MIG", None, None)
    memory = int(mebibytes) << 20 if mebibytes.isdigit() else None
    return Device(name, memory, float(watts) if watts[:1].isdigit() else None)


def local_cpu(ranks: int) -> Device:
    """Return this machine as a device, its memory, or a container's limit, shared by `ranks` ranks."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # no such file, or no limit: 'max'
            memory = min(memory, int((_CGROUP / name).read_text()))
    return Device("cpu", memory // ranks, None)


@dataclass(frozen=True)
class Rates:
    """Rates that the user states, or defaults. None: unknown."""

    peak_flops: float | None  # of a device, dense, at the run's precision
    mfu: float  # share of the peak that is reached while computing
    bandwidth: float  # bytes per second between machines, or between the devices of one
    watts: float | None  # per device
    price: float | None  # per device and hour


@dataclass(frozen=True)
class Cost:
    computing: float  # seconds
    communicating: float  # seconds, counted as not overlapping with computation
    device_hours: float
    kwh: float | None
    price: float | None

    @property
    def seconds(self) -> float:
        return self.computing + self.communicating


def run_cost(computing: float, communicating: float, ranks: int, rates: Rates) -> Cost:
    hours = (computing + communicating) / 3600 * ranks
    return Cost(
        computing,
        communicating,
        device_hours=hours,
        kwh=None if rates.watts is None else hours * rates.watts / 1000,
        price=None if rates.price is None else hours * rates.price,
    )
