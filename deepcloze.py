"""The `deepcloze` command. It checks that it imports its own packages before it imports any."""

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

_PACKAGES = ("launcher", "pretrain", "finetune", "experiment")


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    for name in _PACKAGES:
        if (found := _location(name)) != Path(__file__).resolve().with_name(name):
            print(
                f"deepcloze: {found} hides deepcloze's own package '{name}': {found.parent} comes first on Python's "
                "path. Rename it, or remove that folder from PYTHONPATH",
                file=sys.stderr,
            )
            sys.exit(2)
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
