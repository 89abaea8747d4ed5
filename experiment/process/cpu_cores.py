"""The CPU cores that a process may use. Preflight sends this file to other hosts, see `launcher/hosts/probe.py`."""

import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_cores() -> int:
    """Count the CPU cores that this process may use: its affinity, limited by a container's quota."""
    return within_quota(len(os.sched_getaffinity(0)))


def within_quota(cores: int) -> int:
    """Return at most as many cores as a container's quota allows (cgroup v2 or v1)."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or no quota: 'max'
            quota, period = map(int, " ".join((_CGROUP / name).read_text() for name in names).split())
            if quota > 0:  # -1: none
                cores = min(cores, max(1, quota // period))
    return cores
