"""Processes that benchmarks start."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from launcher.ranks.environment import GLIBC_TUNABLES

DEFAULT_ALLOCATOR: dict[str, str] = {}
OUR_ALLOCATOR = {"GLIBC_TUNABLES": GLIBC_TUNABLES}  # which `deepcloze pretrain` gives its ranks


def deepcloze(*arguments: str, threads: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run a command of deepcloze; raises CalledProcessError if it fails. `threads`: of each of its processes."""
    variables = _variables(threads, environment)
    subprocess.run([sys.executable, "-m", "launcher", *arguments], env=variables, stdout=sys.stderr, check=True)


def run_module(
    module: str, settings: dict[str, Any], threads: int | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    """The JSON that `python -m module SETTINGS` prints last; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", module, json.dumps(settings)]
    variables = _variables(threads, environment)
    finished = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def _variables(threads: int | None, environment: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **(environment or {})}
