"""Checkpoints on disk: their names, what makes one complete, and which are kept. Knows nothing of engines."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from experiment.errors import UserError
from experiment.run_folder import write_text

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_MARK = "COMPLETE"


@dataclass(frozen=True)
class Retention:
    keep_last: int
    keep_every: int | None = None
    best: int | None = None  # this step's is kept as long as it is the best


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Marked checkpoints of a run, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name) and (path / _MARK).is_file()]
    return sorted(found, key=_step)


def named_checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints that a path means, oldest first: one checkpoint, the one that `checkpoints/best` names,
    or all of a run. None where it means nothing."""
    if path.name == "best" and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").strip()
    path = path.resolve()
    return [path] if (path / _MARK).is_file() else complete_checkpoints(path / "checkpoints")


def verify(checkpoint: Path) -> str | None:
    """None for a complete, undamaged checkpoint, else what is wrong with it."""
    try:
        checksums: dict[str, str] = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {_MARK} file cannot be read: {error}"
    if not isinstance(checksums, dict) or not checksums:
        return f"its {_MARK} file is damaged"
    for name, expected in checksums.items():
        try:
            found = _checksum(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != expected:
            return f"{name} is damaged (checksum {found}, expected {expected})"
    return None


def newest_usable(checkpoints: Path) -> Path | None:
    """The newest complete and undamaged checkpoint; says why it passed over a newer one. Raises UserError if none of
    several is usable."""
    candidates = complete_checkpoints(checkpoints)
    return last_usable(candidates) if candidates else None


def last_usable(candidates: Sequence[Path]) -> Path:
    """The last of some complete checkpoints that is undamaged, as `newest_usable`."""
    for checkpoint in reversed(candidates):
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("passing over checkpoint %s: %s", checkpoint, problem)
    raise UserError(
        f"none of the {len(candidates)} checkpoints in {candidates[-1].parent} can be read; "
        f"the newest is {candidates[-1]}"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def mark(folder: Path) -> None:
    """Make a folder a complete checkpoint: sync all that is in it to disk, then write its checksums."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    write_json(folder / _MARK, {str(path.relative_to(folder)): _checksum(path) for path in files})
    sync(folder)


def name_best(checkpoints: Path, step: int) -> None:
    """Let `checkpoints/best` say which checkpoint is the best one."""
    write_text(checkpoints / "best", f"{checkpoint_path(checkpoints, step).name}\n")


def apply_retention(checkpoints: Path, keep: Retention, newest: int) -> None:
    """Delete the checkpoints that need not be kept, and what unfinished saves left.

    `newest`: the step of the one just saved. Those of later steps are damaged, or the run would have gone on from them;
    they do not count as kept.
    """
    for leftover in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    by_step = {_step(path): path for path in complete_checkpoints(checkpoints)}
    for step in [step for step in by_step if step <= newest][: -keep.keep_last]:
        if step != keep.best and (keep.keep_every is None or step % keep.keep_every != 0):
            # Renamed first: a half-deleted checkpoint is none, and the next save tidies it up.
            aside = by_step[step].rename(checkpoints / f".{by_step[step].name}.partial")
            shutil.rmtree(aside)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 24):
        yield block


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
