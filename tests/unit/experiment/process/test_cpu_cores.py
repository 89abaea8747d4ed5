import os
from pathlib import Path

import pytest

from experiment.process import cpu_cores


def test_a_container_quota_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches threads for all cores of the host in a container that may use only a few, also on older systems
    (cgroup v1)."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    v1 = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
    for files, cores in (
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        (dict(zip(v1, ("300000\n", "100000\n"), strict=True)), 3),
        (dict(zip(v1, ("-1\n", "100000\n"), strict=True)), 64),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        monkeypatch.setattr(cpu_cores, "_CGROUP", folder)
        assert cpu_cores.cpu_cores() == cores
