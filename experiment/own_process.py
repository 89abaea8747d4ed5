"""Processes that run our modules: they import the code of the process that starts them, whatever is installed or lies
in the working directory."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from experiment.provenance import REPOSITORY


def module_command(module: str) -> tuple[str, ...]:
    """Runs a module as a program; start it with `own_environment`."""
    return (sys.executable, "-P", "-m", module)


def own_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {**environ, "PYTHONPATH": python_path(environ, REPOSITORY)}


def python_path(environ: Mapping[str, str], root: Path) -> str:
    """PYTHONPATH with `root` as its first entry."""
    others = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry not in ("", str(root))]
    return ":".join([str(root), *others])
