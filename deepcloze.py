"""The `deepcloze` command. It imports its own packages, whatever else on Python's path has their names."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

_PACKAGES = ("launcher", "pretrain", "finetune", "experiment")
_ROOT = Path(__file__).resolve().parent


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if any(_location(name) != _ROOT / name for name in _PACKAGES):
        sys.path.insert(0, str(_ROOT))
        from experiment.own_process import own_environment

        os.environ.update(own_environment())  # for worker processes
    try:
        from launcher.__main__ import run as run_launcher
    except KeyboardInterrupt:
        sys.exit(130)
    run_launcher()


def _location(name: str) -> Path:
    """The folder, or the file, that `import name` would import."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return Path(name)
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(str(spec.origin)).resolve()
