"""What a published number has to state besides the command: date, hardware and versions."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil


def describe_machine() -> str:
    """One line with today's date, the CPU, the memory, and the versions of Python and the libraries."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    hardware = f"{_cpu()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return f"{date.today()}, {hardware}, Python {platform.python_version()}, {versions}"


def _cpu() -> str:
    """With family and model where /proc/cpuinfo has them: in a virtual machine, CPUs of all generations may have one
    name, and the latest may be twice as fast."""
    first_core = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first_core.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name
