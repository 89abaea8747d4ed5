"""The device of a plan."""

from pathlib import Path

import pytest

from pretrain.plan import cost
from pretrain.plan.cost import UNKNOWN_GPU, Device, local_cpu, local_gpu


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (
            "NVIDIA H100 80GB HBM3, 81559, 700.00\nNVIDIA L4, 23034, 72.00\n",
            ("NVIDIA H100 80GB HBM3", 81559 << 20, 700.0),
        ),
        ("NVIDIA GB10, [N/A], [N/A]\n", ("NVIDIA GB10", None, None)),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_first_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, found: tuple[str, int | None, float | None] | None
) -> None:
    """Catches units, a plan for the CPU where the memory or the power of a GPU is unknown, and one for a whole GPU
    where a part of it is used."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert local_gpu() == (UNKNOWN_GPU if found is None else Device(*found))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-41b36014")
    assert local_gpu() == (UNKNOWN_GPU if found is None else Device(f"{found[0]} MIG", None, None))


def test_without_nvidia_smi_the_gpu_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_gpu() == UNKNOWN_GPU


OLDER = (
    *(
        "Tesla V100-SXM2-16GB",
        "Tesla P100-PCIE-16GB",
        "Tesla K80",
        "Tesla T4",
        "Tesla C2050",
        "V100",
        "T4",
        "P40",
        "C2050",
    ),
    *("NVIDIA GeForce RTX 2060 SUPER", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA TITAN RTX", "Quadro RTX 8000"),
    *("NVIDIA GeForce GTX 1660 Ti", "GTX1080", "NVIDIA GeForce GT 1030", "NVIDIA GeForce MX450", "Quadro P2000"),
    *("NVIDIA T600", "NVIDIA T600 Laptop GPU", "NVIDIA T1000 8GB", "NVIDIA T1200 Laptop GPU", "GRID V100D-8Q"),
)
NEWER = (
    *("NVIDIA RTX 2000 Ada Generation", "NVIDIA GeForce RTX 2050", "NVIDIA GeForce MX570", "NVIDIA RTX A2000 12GB"),
    *(
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB",
        "NVIDIA A40-48Q",
        "NVIDIA L4",
    ),
    *("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
    *("NVIDIA B200", "NVIDIA GB10", "AMD Instinct MI300X", "nvidia-tesla-a100", "Quadro RTX A6000"),
)


@pytest.mark.parametrize(("names", "older"), [(OLDER, True), (NEWER, False)])
def test_older_gpus_are_known_by_their_names(names: tuple[str, ...], older: bool) -> None:
    """Catches flat rows for a GPU without flash attention, and packed ones for one whose name is similar."""
    assert [name for name in names if (Device(name, None, None).capability < (8, 0)) != older] == []


def test_a_cpu_has_no_reserve() -> None:
    """Catches a CPU that is planned as a GPU because of capital letters."""
    assert [Device(name, 1 << 40, None).reserve == (0, 0) for name in ("cpu", "CPU", "H100")] == [True, True, False]


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a plan that fits the host, but not the container."""
    monkeypatch.setattr(cost, "_CGROUP", tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("max\n")
    assert local_cpu(1).memory == cost.os.sysconf("SC_PAGE_SIZE") * cost.os.sysconf("SC_PHYS_PAGES")
    (tmp_path / name).write_text(f"{1 << 20}\n")
    assert local_cpu(2).memory == 1 << 19
