"""`RUN/provenance.json`: which code, on which machine, with which libraries, made this run, and from what.

{"run_id": …, "ancestors": […], "attempts": [{"command": …, "git": …, "versions": …, "hardware": …, …}, …]}

Every model folder that a run writes holds a `deepcloze.json`, {"run_id": …, "folder": …, "step": …, "ancestors": […]},
which goes wherever the folder is copied, so that whatever begins with it knows the whole line it descends from.
"""

import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import sha256, write_json
from experiment.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pyarrow", "wandb")
_ORIGIN = "deepcloze.json"
_WEIGHTS = (".safetensors", ".bin")


def collect_provenance(command: Sequence[str], world_size: int = 1) -> dict[str, Any]:
    """One attempt at a run: what was started, when, where, with which code and libraries."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "world_size": world_size,
        "git": git_state(REPOSITORY),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("deepcloze", *LIBRARIES)},
        "hardware": _hardware(),
    }


def write_provenance(
    folder: RunFolder, attempt: Mapping[str, Any], ancestors: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """Add an attempt to RUN/provenance.json and return the run's id, which is drawn at the first attempt.

    ancestors: the models that this one's weights came from, oldest first (see `ancestors_of`); None at an attempt that
    goes on from an earlier one. Raises UserError for a file that is damaged.
    """
    record = read_provenance(folder) or {"run_id": secrets.token_hex(8), "ancestors": [], "attempts": []}
    if ancestors is not None:
        record["ancestors"] = list(ancestors)
    write_json(folder.provenance, {**record, "attempts": [*record["attempts"], dict(attempt)]})
    run_id: str = record["run_id"]
    return run_id


def read_provenance(folder: RunFolder) -> dict[str, Any] | None:
    """RUN/provenance.json, None for a run that never began. Raises UserError for a file that is damaged."""
    try:
        record = json.loads(folder.provenance.read_text(encoding="utf-8"))
        if not (isinstance(record["run_id"], str) and isinstance(record["attempts"], list)):
            raise TypeError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder.provenance} is damaged: expected an object with 'run_id' and 'attempts'") from None
    return dict(record)


def write_origin(model: Path, folder: RunFolder, record: Mapping[str, Any], step: int) -> None:
    """Leave in a model folder which run wrote it. `record`: the run's provenance."""
    run = {"run_id": record["run_id"], "folder": str(folder.path), "step": step}
    write_json(model / _ORIGIN, run | {"ancestors": record["ancestors"]})


def origin_of(model: Path) -> dict[str, Any] | None:
    """The run that wrote a model folder, {run_id, folder, step, ancestors}, None for somebody else's model. Raises
    UserError for a file that is damaged."""
    path = model / _ORIGIN
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        return {key: origin[key] for key in ("run_id", "folder", "step", "ancestors")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: expected an object with run_id, folder, step and ancestors") from None


def ancestors_of(model: Path, relation: str) -> list[dict[str, Any]]:
    """The ancestors of a run that begins with the weights in a Hugging Face folder, oldest first.

    relation: how it takes over from the last one, init_from (weights alone) or fork (the whole state). A model that no
    run of ours wrote is known by its folder and the SHA-256 of its weight files, by which model hubs know them too.
    """
    origin = origin_of(model)
    if origin is None:
        weights = {path.name: sha256(path) for path in sorted(model.iterdir()) if path.suffix in _WEIGHTS}
        return [{"relation": relation, "folder": str(model.absolute()), "name": model.name, "weights": weights}]
    return [*origin.pop("ancestors"), {"relation": relation, **origin}]


def git_state(repository: Path) -> dict[str, Any] | None:
    """{'commit', 'dirty'} of a checkout; None where it is none or git is missing."""
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(repository: Path, *arguments: str) -> str:
    # A folder inside of somebody else's checkout is no checkout of its own; the GIT_DIR of a hook is not ours; a clone
    # on a cluster's shared disk may belong to another user.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(repository.parent)
    command = ["git", "-c", "safe.directory=*", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=environment)
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
