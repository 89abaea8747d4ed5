"""Capabilities of devices, and how this process uses memory and cores."""

import ctypes
import os
import re
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.errors import UserError, warn_once
from experiment.process.own_process import given_environment, hide_gpus, use_cpu
from experiment.process.shared_cores import share_cores

if TYPE_CHECKING:
    import torch

HOPPER = 9  # major number of the compute capability of H100 and H200
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_LARGEST = 2**31 - 1
_MMAP_THRESHOLD = 32 * 2**20  # maximum of glibc's dynamic threshold, see mallopt(3)


def prepare_process() -> None:
    """Let this process of ours use memory and cores well on a CPU, and no GPU with DS_ACCELERATOR=cpu. Call it before
    it computes; results are the same."""
    import torch

    hide_gpus()
    keep_freed_memory()
    share_cores()
    if not torch.cuda.is_available():
        use_cpu()  # transformers imports DeepSpeed


def keep_freed_memory() -> None:
    """Let glibc's malloc keep and reuse freed memory, for training on a CPU.

    By default it maps and unmaps memory for each large tensor, and page faults take a tenth of the time of small
    models. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`, and return the memory that is free: for a process that is not ours."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 65536)  # the default
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD)
    trim_memory()


def trim_memory() -> None:
    """Return the memory that is free now, also after `keep_freed_memory`. Does nothing with another C library."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_device() -> "torch.device":
    """Return CUDA if torch can use a GPU, else the CPU, with a warning if there is one; with DS_ACCELERATOR=cpu the
    CPU. Raises UserError as `check_gpu`."""
    import torch

    hide_gpus()
    if torch.cuda.is_available():
        check_gpu()
        return torch.device("cuda")
    if problem := unusable_gpus(given_environment()):
        warn_once(f"computing on the CPU: {problem}")
    return torch.device("cpu")


def check_gpu() -> None:
    """Raise UserError if this build of torch is one for AMD's GPUs or has no code for the current GPU.

    Code for a device, sm, also runs on those of the same major and a higher minor number; PTX, compute, on all later
    ones (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    import torch

    if torch.version.hip is not None:
        raise UserError("AMD GPUs are not supported: set DS_ACCELERATOR=cpu to compute on the CPU")
    device = torch.cuda.get_device_capability()
    found = [match for name in torch.cuda.get_arch_list() if (match := re.match(r"(sm|compute)_(\d+)(\d)", name))]
    built = [(kind, (int(major), int(minor))) for kind, major, minor in (match.groups() for match in found)]
    if not built or any(code <= device and (kind == "compute" or code[0] == device[0]) for kind, code in built):
        return
    index = "cu126" if device < (7, 5) else "cu130"
    raise UserError(
        f"torch {torch.__version__} has no code for this GPU, {torch.cuda.get_device_name()} of compute capability "
        f"{device[0]}.{device[1]}; install torch from another index, such as https://download.pytorch.org/whl/{index}"
    )


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: allocated CUDA memory or, without CUDA, resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def has_native_bf16(device_type: str) -> bool:
    """Return whether a device computes bf16 itself; False where it is emulated, several times slower than fp32.
    device_type: cpu or cuda."""
    import torch

    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(feature, False) for feature in ("avx512_bf16", "amx_bf16"))


def lacks_avx512() -> bool:
    """Return whether this machine's CPU is an x86 one without AVX-512, which multiplies matrices at half the speed or
    less."""
    import torch

    features = torch.cpu.get_capabilities()
    return features.get("architecture") == "x86_64" and not features.get("avx512_f", False)


def unusable_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """Return a message if this process may use NVIDIA GPUs, but torch cannot; None if `environ` hides them. devices:
    the folder of devices. A job that got no GPU may not open theirs."""
    import torch

    hidden = environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")  # the last one is SLURM's
    gpus = [path for path in sorted(devices.glob("nvidia[0-9]*")) if os.access(path, os.R_OK | os.W_OK)]
    if hidden or not gpus or environ.get("DS_ACCELERATOR", "cuda") != "cuda" or torch.cuda.is_available():
        return None
    reason = ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # AssertionError: a build of torch without CUDA
        reason = f" ({str(error).partition(chr(10))[0]})"
    return (
        f"there is a GPU, {gpus[0]}, but torch {torch.__version__} cannot use it{reason}: see nvidia-smi and "
        "https://pytorch.org/get-started, or set DS_ACCELERATOR=cpu to choose the CPU"
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device for dense matrices; None if unknown, as for every CPU.

    device_name: as from `torch.cuda.get_device_name`. precision: fp16 or bf16 (tensor cores, fp32 accumulation), or
    fp32 (no tensor cores).
    """
    peaks = next((peaks for pattern, peaks in _PEAKS if re.search(pattern, device_name, re.IGNORECASE)), {})
    is_part = "MIG" in device_name.upper()
    return None if is_part or precision not in peaks else peaks[precision] * 1e12


def known_devices() -> str:
    """Return names for which `peak_flops` knows peaks, separated by commas."""
    return ", ".join(re.sub(r"\\b|\?|\(.*", "", pattern) for pattern, _ in _PEAKS)


# TFLOP/s without sparsity. The first pattern found in the name applies.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Tesla V100 GPU accelerator, data sheet, January 2020 (the V100S in the 2019 one)
    (r"\bV100S", {"fp16": 130.0, "fp32": 16.4}),
    (r"\bV100-PCIE", {"fp16": 112.0, "fp32": 14.0}),
    (r"\bV100", {"fp16": 125.0, "fp32": 15.7}),
    # NVIDIA A100 Tensor Core GPU, data sheet, June 2021
    (r"\bA100\b", {"fp16": 312.0, "bf16": 312.0, "fp32": 19.5}),
    # NVIDIA H100 Tensor Core GPU, data sheet: half of the figures with sparsity
    (r"\bH100 PCIe", {"fp16": 756.5, "bf16": 756.5, "fp32": 51.0}),
    (r"\bH100 NVL", {"fp16": 835.5, "bf16": 835.5, "fp32": 60.0}),
    (r"\bH100\b", {"fp16": 989.5, "bf16": 989.5, "fp32": 67.0}),
    # NVIDIA H200 Tensor Core GPU, data sheet: half of the figures with sparsity
    (r"\bH200 NVL", {"fp16": 835.5, "bf16": 835.5, "fp32": 60.0}),
    (r"\bH200\b", {"fp16": 989.5, "bf16": 989.5, "fp32": 67.0}),
    # NVIDIA L40S, data sheet
    (r"\bL40S\b", {"fp16": 362.05, "bf16": 362.05, "fp32": 91.6}),
    # NVIDIA A10 Tensor Core GPU, data sheet
    (r"\bA10\b", {"fp16": 125.0, "bf16": 125.0, "fp32": 31.2}),
    # NVIDIA Ada GPU architecture, white paper, appendix A
    (r"\bRTX ?4090\b(?! D| Laptop)", {"fp16": 165.2, "bf16": 165.2, "fp32": 82.6}),
)
