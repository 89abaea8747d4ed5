"""The device that a plan is for: this machine's, or one that the user names. Takes no device."""

import os
import subprocess
from dataclasses import dataclass

_TIMEOUT = 10.0  # seconds, for nvidia-smi


@dataclass(frozen=True)
class Device:
    """What a rank computes on. None: unknown."""

    name: str  # 'cpu', or as `torch.cuda.get_device_name` gives it
    memory: int | None  # bytes
    watts: float | None

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def local_gpu() -> Device | None:
    """The first GPU that nvidia-smi lists, with its power limit; None if it lists none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,power.limit", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
        name, mebibytes, watts = listed.splitlines()[0].split(", ")
        return Device(name, int(mebibytes) << 20, float(watts) if watts[0].isdigit() else None)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def local_cpu(ranks: int) -> Device:
    """This machine's memory, shared by `ranks` ranks."""
    return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks, None)
