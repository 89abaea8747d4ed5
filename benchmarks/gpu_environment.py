"""The machine and the commit of a GPU session: a step of `benchmarks.gpu_session`. Fails if its GPU is broken."""

import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu_results import print_figures
from benchmarks.measuring import describe_machine
from experiment.files import REPOSITORY
from experiment.run_files.provenance import describe_commit, git_state


def describe() -> dict[str, Any]:
    """`gpu` is None if there is none."""
    commit = describe_commit({"git": git_state(REPOSITORY)})
    found: dict[str, Any] = {"machine": describe_machine(), "commit": commit, "cuda": torch.version.cuda, "gpu": None}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    found["C compiler"] = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    ones = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
    assert (ones @ ones).float().mean().item() == 1024.0, "the GPU computes wrong products"
    return found | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "nccl": _nccl(),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _nccl() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print_figures(describe())
