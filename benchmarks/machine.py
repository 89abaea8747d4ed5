"""What a published number has to state besides the command: date, hardware and versions."""

import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> str:
    """One line with today's date, the CPU, and the versions of Python and the libraries."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"
    return f"{date.today()}, {machine}, Python {platform.python_version()}, {versions}"
