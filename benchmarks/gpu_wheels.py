"""Gather wheels for a machine that has torch but no network: `benchmarks.gpu_session --prepare`."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiment.errors import UserError
from experiment.files import REPOSITORY

_SOURCE_ONLY = ("deepspeed", "seqeval")  # have no wheels on PyPI
_TEST_TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
_UNUSED = ("wandb",)  # twice as large as all the others that a machine with torch lacks
_OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")  # beginnings of what is there with torch
_GLIBC = 28  # 2.28, as torch's own wheels need


def prepare(folder: Path, python: str, torch: str, installed: Path | None) -> None:
    """Fill the folder with what deepcloze and its GPU tests need besides torch, and print how to install it.

    python, torch: versions on that machine. installed: output of `pip freeze` there, or names alone; what is there in a
    version that all packages accept is left out. Raises UserError if pip fails.
    """
    there = _read_installed(installed)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--prepare {folder} is not empty; use another folder")
    needed = _requirements()
    pinned = [f"torch=={torch.partition('+')[0]}"]
    for name in _SOURCE_ONLY:
        source = next(requirement for requirement in needed if canonicalize_name(requirement.name) == name)
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    target = _target(folder, python)
    dry_run = ("install", "--dry-run", "--ignore-installed", "--target", str(folder), "--report", "-", *target)
    report = json.loads(_pip(*dry_run, *pinned, *map(str, needed)))
    wanted = list(_select([entry["metadata"] for entry in report["install"]], needed, there))
    _pip("download", "--no-deps", "--dest", str(folder), *target, *wanted)
    wheels = list(folder.glob("*.whl"))
    print(f"{folder}: {len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 1e6:.1f} MB")
    print("On the other machine, in a copy of this repository:")
    print(f"    python3 -m pip install --no-index --no-deps --target /tmp/packages {folder}/*.whl")
    print("    PYTHONPATH=/tmp/packages python3 -m benchmarks.gpu_session")


def _requirements() -> list[Requirement]:
    """Of deepcloze and its GPU tests, without torch."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = [text for text in project["optional-dependencies"]["test"] if Requirement(text).name in _TEST_TOOLS]
    requirements = map(Requirement, [*project["dependencies"], *tools])
    return [requirement for requirement in requirements if requirement.name not in ("torch", *_UNUSED)]


def _read_installed(path: Path | None) -> dict[str, str | None]:
    """Versions by name; None: unknown."""
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--installed {path}: {error.strerror}") from None
    entries = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {canonicalize_name(name.partition(" @ ")[0]): found or None for name, _, found in entries if name}


def _target(folder: Path, python: str) -> list[str]:
    """Options of pip for wheels for another Python."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(_GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    options = ["--only-binary=:all:", "--find-links", str(folder), "--implementation", "cp"]
    options += ["--python-version", ".".join(python.split(".")[:2])]
    return options + [option for platform in platforms for option in ("--platform", platform)]


def _select(
    resolved: list[dict[str, Any]], needed: Iterable[Requirement], there: dict[str, str | None]
) -> Iterable[str]:
    """Yield the packages to carry, as NAME==VERSION. `resolved`: metadata of all that deepcloze and torch need."""
    accepted = list(needed) + [
        requirement
        for metadata in resolved
        for requirement in map(Requirement, metadata.get("requires_dist", []))
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    for metadata in resolved:
        name, found = canonicalize_name(metadata["name"]), metadata["version"]
        limits = [requirement.specifier for requirement in accepted if canonicalize_name(requirement.name) == name]
        has = there.get(name)
        is_there = name in there and (has is None or all(limit.contains(has, prereleases=True) for limit in limits))
        if not is_there and not name.startswith(_OF_TORCH) and name not in _SOURCE_ONLY:
            yield f"{name}=={found}"


def _pip(*arguments: str) -> str:
    """Return the output of pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise UserError(f"pip {arguments[0]} failed with exit code {finished.returncode}")
    return finished.stdout
