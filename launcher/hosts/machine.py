"""The machine that a launch starts from: its GPUs or CPU cores, its environment, a free port."""

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from experiment.files import read_text
from experiment.process.cpu_cores import cpu_cores
from experiment.process.fast_imports import fast_imports
from experiment.process.hardware import unusable_gpus
from experiment.process.own_process import given_environment, use_cpu

DeviceKind = Literal["cuda", "cpu"]

# Names in /dev: GPUs of NVIDIA, of Jetson boards, of AMD, and of Windows under WSL.
_GPU_DEVICES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")


@dataclass(frozen=True)
class Devices:
    """The devices of this machine: GPUs by index, or its CPU cores counted from 0."""

    kind: DeviceKind
    indices: tuple[int, ...]
    problem: str | None = None  # why no ranks can be placed on this machine


@dataclass(frozen=True)
class Machine:
    """The machine a launch starts from."""

    devices: Devices
    environ: Mapping[str, str] = field(repr=False)  # may contain secrets
    find_port: Callable[[], int]  # a free port: called shortly before it is used
    deepspeed_env_files: tuple[Path, ...] = ()  # the user's own, which DeepSpeed exports to other hosts

    @cached_property  # a restart, perhaps weeks later, uses what the launch has read
    def deepspeed_env_text(self) -> str:
        """Read the lines of all these files. Raises UserError for one that cannot be read."""
        return "\n".join(read_text(path, "the DeepSpeed environment file") for path in self.deepspeed_env_files)


def launch_machine() -> Machine:
    """Return the current state of this machine and the environment of this process, which uses the CPU if there is no
    GPU."""
    environ = given_environment()
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    # Unlike those of `Path`, these functions never raise: the user may have no home, or one that may not be searched.
    files = (Path(os.path.expanduser("~"), name), Path.cwd() / name)  # noqa: PTH111
    machine = Machine(
        devices=find_devices(environ),
        environ=environ,
        find_port=free_port,
        deepspeed_env_files=tuple(filter(os.path.isfile, files)),
    )
    if machine.devices.kind == "cpu":
        use_cpu()
    return machine


def find_devices(environ: Mapping[str, str]) -> Devices:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, or, without GPUs, the cores this process may use.

    DS_ACCELERATOR=cpu selects the cores on a machine with GPUs too. GPUs that torch cannot use, or that are
    not listed by number, are a problem only if ranks are to run on this machine.
    """
    cores = Devices("cpu", tuple(range(cpu_cores())))
    # nvidia-modprobe makes the devices when a program first asks for them.
    if environ.get("DS_ACCELERATOR") == "cpu" or (
        guess_device(environ) == "cpu" and not shutil.which("nvidia-modprobe")
    ):
        return cores
    with fast_imports():
        import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        return replace(cores, problem=unusable_gpus(environ))
    if visible is None:
        return Devices("cuda", tuple(range(count)))
    names = [name.strip() for name in visible.split(",")]
    if not all(map(str.isdigit, names)):
        problem = f"CUDA_VISIBLE_DEVICES={visible}: expected GPU numbers such as 0,1; slots are these"
        return Devices("cuda", tuple(range(count)), problem)
    return Devices("cuda", tuple(map(int, names))[:count])


def guess_device(environ: Mapping[str, str], devices: Path = Path("/dev")) -> DeviceKind:
    """Return the kind of device for ranks on this machine, found without torch, whose import takes seconds. 'cuda'
    where there may be a GPU: DeepSpeed asks torch. 'cpu' where no driver has made a device."""
    if "DS_ACCELERATOR" in environ:
        return "cpu" if environ["DS_ACCELERATOR"] == "cpu" else "cuda"
    return "cuda" if any(any(devices.glob(name)) for name in _GPU_DEVICES) else "cpu"


def free_port() -> int:
    """Return a TCP port of this machine on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
