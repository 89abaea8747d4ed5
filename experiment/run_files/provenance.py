"""`RUN/provenance.json`: the code, machine, libraries and models that a run came from.

{"run_id": …, "ancestors": […], "attempts": [{"command": …, "git": …, "versions": …, "hardware": …, …}, …]}
Attempts also have the run's `folder`, the `step` that they resume from, and whether the run `starts_over` with other
settings; in pretraining, `changes` of settings, "key: old -> new"; in fine-tuning, `total_steps`, with steps counted
over all seeds.

Every model folder that a run writes contains `deepcloze.json`, {"run_id": …, "folder": …, "step": …, "ancestors": […]}.
It is copied along with the folder, so a run that starts from the model can record all of its ancestors. Such folders
are published: their `folder`s are names, not paths of this machine. That of averaged weights also has `averaged`: true,
the ancestor that a run has forked the `tokens` at that step.

Both also have `decontaminated`, {corpus: digests of the evaluation texts of tasks}, if that is known of a corpus.
"""

import importlib.metadata
import os
import platform
import secrets
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from experiment.config import Section, dump_config, flatten
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from experiment.files import REPOSITORY, parse_json, read_json, sha256, write_json
from experiment.formatting import UNKNOWN
from experiment.models.hub_names import hub_name, public_name
from experiment.run_files.run_folder import RunFolder

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pyarrow", "wandb")
ORIGIN_FILE = "deepcloze.json"
_WEIGHTS = (".safetensors", ".bin")


def collect_provenance(command: Sequence[str], world_size: int = 1, hosts: int = 1) -> dict[str, Any]:
    """Describe one attempt at a run: command, date, machine, code and libraries. world_size: ranks on all hosts."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "world_size": world_size,
        "hosts": hosts,
        "git": git_state(REPOSITORY),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("deepcloze", *LIBRARIES)},
        "hardware": _hardware(),
    }


def write_provenance(
    folder: RunFolder,
    attempt: Mapping[str, Any],
    ancestors: Sequence[Mapping[str, Any]] | None = None,
    decontaminated: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Add an attempt to RUN/provenance.json and return its content. The run's id is drawn at random at the first
    attempt.

    ancestors: the models that the run's weights came from, oldest first (see `ancestors_of`); None if the run is
    resumed. Raises UserError if the file is damaged.
    """
    record = read_provenance(folder) or {"run_id": secrets.token_hex(8), "ancestors": [], "attempts": []}
    record["attempts"].append(dict(attempt))
    if ancestors is not None:
        record["ancestors"] = list(ancestors)
    if decontaminated:
        record["decontaminated"] = dict(decontaminated)
    write_json(folder.provenance, record)
    return record


def has_logged_with_other_config(folder: RunFolder, config: Section, same_result: tuple[str, ...]) -> bool:
    """Return whether the run has logged events with another RUN/config.yaml. Call it before the file is written.

    same_result: beginnings of keys that may differ.
    """
    with suppress(OSError, yaml.YAMLError):
        before, now = (flatten(read_yaml(text)) for text in (folder.config.read_text("utf-8"), dump_config(config)))
        changed = (key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return folder.metrics.stat().st_size > 0 and not all(key.startswith(same_result) for key in changed)
    return False


def wandb_id(provenance: Mapping[str, Any]) -> str:
    """Return the id of a run in W&B, which keeps the values that it has of a step: it is another one whenever the run
    has started over with other settings."""
    restarts = sum(attempt.get("starts_over", False) for attempt in provenance["attempts"])
    return f"{provenance['run_id']}-{restarts + 1}" if restarts else str(provenance["run_id"])


def separate_copy(folder: RunFolder) -> Path | None:
    """Give a copied run folder an id of its own if the first folder is still there: W&B and mirrors would take the two
    for one run. Returns the first folder of such a copy."""
    record = read_provenance(folder)
    if record is None or not record["attempts"] or "folder" not in record["attempts"][-1]:
        return None
    first = Path(record["attempts"][-1]["folder"])
    with suppress(OSError, ValueError):  # not copied from a mirror
        if folder.path.samefile(folder.restored.read_text(encoding="utf-8")):
            return None
    with suppress(OSError, UserError):  # it is gone, or may not be read
        there = read_provenance(RunFolder(first))
        if there is not None and there["run_id"] == record["run_id"] and not first.samefile(folder.path):
            write_json(folder.provenance, {**record, "run_id": secrets.token_hex(8)})
            return first
    return None


def read_provenance(folder: RunFolder) -> dict[str, Any] | None:
    """RUN/provenance.json, None if the run was never started. Raises UserError if the file is damaged."""
    try:
        return parse_provenance(folder.provenance.read_bytes(), str(folder.provenance))
    except FileNotFoundError:
        return None


def other_version(folder: RunFolder) -> str | None:
    """Return another version of deepcloze than this one that was used in a run, the last one; None without any."""
    with suppress(OSError, UserError, LookupError, TypeError, AttributeError):
        versions = [attempt["versions"]["deepcloze"] for attempt in (read_provenance(folder) or {})["attempts"]]
        return next((str(found) for found in reversed(versions) if found not in (None, _version("deepcloze"))), None)
    return None


def parse_provenance(text: bytes, name: str) -> dict[str, Any]:
    """Parse the content of a provenance.json. Raises UserError, with the name of the file, if it is damaged."""
    try:
        record = parse_json(text)
        attempts, ancestors = record["attempts"], record["ancestors"]
        if not (isinstance(record["run_id"], str) and isinstance(attempts, list) and isinstance(ancestors, list)):
            raise TypeError
        if not all(isinstance(entry, dict) for entry in (*attempts, *ancestors)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{name} is damaged: expected an object with 'run_id', 'ancestors' and 'attempts'. If it is deleted, a "
            "pretraining run with checkpoints takes it from the newest one; any other run gets another id, and its "
            "earlier attempts are forgotten"
        ) from None
    return dict(record)


def write_origin(model: Path, folder: RunFolder, record: Mapping[str, Any], step: int) -> None:
    """Write deepcloze.json into a model folder of a run. record: the run's provenance."""
    ancestors = [{**ancestor, "folder": public_name(ancestor["folder"])} for ancestor in record["ancestors"]]
    run = {"run_id": record["run_id"], "folder": folder.path.name, "step": step, "ancestors": ancestors}
    known = {key: record[key] for key in ("decontaminated",) if key in record}
    write_json(model / ORIGIN_FILE, run | _averaged(model) | known)


def _averaged(model: Path) -> dict[str, bool]:
    return {"averaged": True} if model.name == "hf-ema" else {}


def read_origin(model: Path) -> dict[str, Any] | None:
    """deepcloze.json of a model folder: {run_id, folder, step, ancestors, …}; None if it was not written by deepcloze.

    Raises UserError if the file is damaged.
    """
    path = model / ORIGIN_FILE
    try:
        origin = read_json(path)
        required = {key: origin[key] for key in ("run_id", "folder", "step", "ancestors")}
        return required | _averaged(model) | dict(origin)  # older versions did not write `averaged`
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: expected an object with run_id, folder, step and ancestors") from None


def ancestors_of(model: Path, relation: str) -> list[dict[str, Any]]:
    """Return the ancestors of a run that starts from the weights in a Hugging Face folder, oldest first.

    relation: of the run to the last ancestor, "init_from" (weights only) or "fork" (full state). A model that was not
    written by deepcloze is identified by its folder and the SHA-256 of its weight files, which model hubs show too; one
    of the Hub also by name and commit.
    """
    if (origin := read_origin(model)) is None:
        weights = {path.name: sha256(path) for path in sorted(model.iterdir()) if path.suffix in _WEIGHTS}
        folder = str(model.absolute())
        name = hub_name(folder)
        known = {"name": model.name} if name is None else {"name": name, "commit": model.name}
        return [{"relation": relation, "folder": folder, **known, "weights": weights}]
    return [*origin.pop("ancestors"), {"relation": relation, **origin}]


def forked_from(ancestors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the ancestor that a run with these ancestors began as a fork of; None if it is no fork."""
    return ancestors[-1] if ancestors and ancestors[-1].get("relation") == "fork" else None


def git_state(repository: Path) -> dict[str, Any] | None:
    """{'commit', 'dirty'} of a git checkout; None if it is not one, or git is missing."""
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(repository: Path, *arguments: str) -> str:
    # Ignore the checkout of a parent folder, and the GIT_DIR of a hook that runs us. Accept a clone that belongs to
    # another user, as on a cluster's shared disk.
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


def describe_commit(attempt: Mapping[str, Any]) -> str:
    """Return the commit of an attempt in provenance.json; '–' if it is not known."""
    git = attempt.get("git")
    return f"{git['commit'][:10]}{' (changed)' if git['dirty'] else ''}" if git else UNKNOWN


def describe_devices(hardware: Mapping[str, Any]) -> str:
    """Return the devices of a host, from an attempt in provenance.json: its GPUs, or its CPU."""
    gpus = Counter(hardware.get("gpus") or [])
    return ", ".join(f"{count} × {name}" for name, count in gpus.items()) or describe_cpu(hardware)


def describe_cpu(hardware: Mapping[str, Any]) -> str:
    return f"{hardware.get('cores', UNKNOWN)} cores, {hardware.get('cpu', UNKNOWN)}"


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
