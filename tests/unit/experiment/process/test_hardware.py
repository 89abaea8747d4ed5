import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError, warn_once
from experiment.process import hardware, own_process
from experiment.process.hardware import available_device, known_devices, peak_flops, peak_memory, unusable_gpus


def test_memory_is_in_bytes() -> None:
    """Catches KiB taken for bytes: a process with torch in it holds far more than 20 MB and less than a TB."""
    if not torch.cuda.is_available():
        assert 20e6 < peak_memory() < 1e12
    else:
        kept = torch.empty(10**8, dtype=torch.uint8, device="cuda")
        assert kept.numel() <= peak_memory() < 1e12


@pytest.mark.parametrize(
    ("devices", "environ", "found"),
    [
        (("nvidia0", "nvidiactl"), {}, True),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": ""}, False),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False),
        (("nvidia0",), {"DS_ACCELERATOR": "cpu"}, False),
        (("nvidiactl", "nvidia-uvm"), {}, False),
    ],
)
def test_gpus_that_torch_cannot_use(
    devices: tuple[str, ...], environ: dict[str, str], found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches training on the CPU because the driver does not fit torch, and a CPU that the user chose and is
    refused."""
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (unusable_gpus(environ, tmp_path) is not None) == found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unusable_gpus(environ, tmp_path) is None


def test_the_cpu_beside_a_gpu_is_taken_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches fine-tuning that takes the CPU silently because the driver does not fit torch, or because this
    process has told DeepSpeed so; and a warning for each point of a sweep."""
    warn_once.cache_clear()
    monkeypatch.setattr(own_process, "_given", {})
    monkeypatch.setenv("DS_ACCELERATOR", "")  # restored at the end
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "unusable_gpus", lambda environ: environ["CUDA_VISIBLE_DEVICES"])
    own_process.use_cpu()
    assert {available_device().type for _ in range(3)} == {"cpu"}
    assert caplog.messages == ["computing on the CPU: 0"]


@pytest.mark.parametrize(
    ("hip", "built", "expected"),
    [
        (None, "sm_80", ""),
        (None, "sm_90", "torch .* has no code for this GPU, an A100 of compute capability 8.0; "),
        ("7.2", "gfx942", "AMD GPUs are not supported: set DS_ACCELERATOR=cpu"),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_not_available(
    hip: str | None, built: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of the first kernel in fine-tuning, and an AMD GPU that is taken for one of NVIDIA's with the
    same capability."""
    monkeypatch.setattr(hardware, "hide_gpus", lambda: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    for name, value in {
        "is_available": True,
        "get_device_capability": (8, 0),
        "get_device_name": "an A100",
        "get_arch_list": [built],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(UserError, match=expected) if expected else nullcontext():
        assert available_device().type == "cuda"


def test_the_cpu_beside_amd_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice that does not help: HIP takes an empty CUDA_VISIBLE_DEVICES for one that is not set."""
    monkeypatch.setattr(own_process, "_given", {})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored at the end
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] in ("", "0"))
    assert available_device().type == "cpu"


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("Tesla V100S-PCIE-32GB", "fp16", 130.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10", "fp16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("h100", "bf16", 989.5),
        ("rtx4090", "bf16", 165.2),
    ],
)
def test_peaks_are_dense_and_of_the_right_variant(name: str, precision: str, teraflops: float) -> None:
    """Catches the doubled figures for sparse matrices, and a PCIe card taken for the faster SXM one."""
    assert peak_flops(name, precision) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Intel(R) Xeon(R) Platinum 8480+", "bf16"),
        ("cpu", "fp32"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("RTX4090D", "bf16"),
        ("NVIDIA GH200 480GB", "bf16"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),
        ("h100 mig 1g.10gb", "bf16"),
        ("NVIDIA H100 80GB HBM3", "fp8"),
    ],
)
def test_no_peak_is_better_than_a_wrong_one(name: str, precision: str) -> None:
    """Catches an MFU against another device's peak."""
    assert peak_flops(name, precision) is None


def test_known_devices_are_names() -> None:
    """Catches a message with the patterns of the table."""
    for name in known_devices().split(", "):
        assert re.fullmatch(r"[\w -]+", name)
        assert peak_flops(name, "fp16") is not None
