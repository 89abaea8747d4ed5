"""Checkpoints on disk: their names, finding and verifying one. Independent of the engine.

A checkpoint is the folder RUN/checkpoints/step-XXXXXXXX. It is complete once it holds the file COMPLETE, which lists
the checksums of all its other files and is written last.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from experiment.errors import DENIED, UserError, inform, is_damage, notify, reason, require_damage
from experiment.files import checksum, fsync_tree, json_digest, names_in, paths_below, read_json, write_json, write_text

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
COMPLETE = "COMPLETE"
BEST = "best"
_STATE = "state.json"
_WAITS = (2.0, 8.0, 20.0)  # seconds

T = TypeVar("T")

Verify = Callable[[Path], str | None]
"""Returns the problem of a complete checkpoint; None without one."""


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. Does not verify them. Raises OSError."""
    return [path for path in _named_checkpoints(checkpoints) if (path / COMPLETE).exists()]


def checkpoints_to_resume(checkpoints: Path, waits: Sequence[float] = _WAITS) -> list[Path]:
    """Return the complete checkpoints of a run that would start over without any. Raises HostError if a disk fails,
    after `waits` in seconds, UserError without permission to list them."""
    try:
        return _read_again(checkpoints, complete_checkpoints, waits)
    except OSError as error:
        require_damage(error, f"{checkpoints} cannot be listed")
        raise


def completed_saves(checkpoints: Path) -> set[tuple[int, int]] | None:
    """Return the steps of the complete checkpoints, each with the time at which it was completed, as st_mtime_ns:
    another one if a damaged checkpoint is saved again. None for a disk error."""
    with suppress(OSError):
        found = complete_checkpoints(checkpoints)
        return {(checkpoint_step(path), (path / COMPLETE).stat().st_mtime_ns) for path in found}
    return None


def incomplete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoints without a COMPLETE file, oldest first. A save has another name until it is complete, so
    these are damaged, or their copy is incomplete."""
    return [path for path in _named_checkpoints(checkpoints) if not (path / COMPLETE).exists()]


def _named_checkpoints(checkpoints: Path) -> list[Path]:
    return sorted((checkpoints / name for name in names_in(checkpoints) if _NAME.fullmatch(name)), key=checkpoint_step)


def find_model_folder(path: Path) -> Path:
    """Return the undamaged Hugging Face folder that `path` refers to: itself, or the one of a checkpoint.

    The checkpoint is `path`, the one that `RUN/checkpoints/best` names, or the newest one of a run: then a damaged one
    is skipped with a warning. Raises UserError if there is none, if all are damaged, or if the one that `path` names is
    damaged or incomplete, also as a finished seed of fine-tuning.
    """
    if not (path / "config.json").is_file():
        return last_usable(_find_candidates(path), _verify_model) / "hf"
    folder = path.resolve()
    if (folder.parent / COMPLETE).exists() and (problem := verify(folder.parent, files_below(folder.name))):
        raise UserError(f"{folder.parent} is damaged: {problem}")
    return path


def names_model_folder(path: Path, folder: Path, any_best: bool = False) -> bool:
    """Return whether `find_model_folder` may have found `folder` by the name `path`, which may be gone since: also if
    `path` is a run that has saved newer checkpoints. any_best: also if it is a file `best` that names another one
    now."""
    names = {folder}
    if folder.name == "hf" and _NAME.fullmatch(folder.parent.name):
        checkpoints = folder.parent.parent
        names |= {folder.parent, checkpoints.parent}
        if any_best or named_best(checkpoints) in (None, folder.parent):
            names.add(checkpoints / BEST)
    names |= {name.resolve() for name in names}  # without .. and links
    return not names.isdisjoint({path.absolute(), path.resolve()})


def _find_candidates(path: Path) -> list[Path]:
    """Return one or more `checkpoint_candidates`. Raises UserError if there are none."""
    if (path / COMPLETE).is_file() and (path / "model" / "config.json").is_file():
        raise UserError(f"{path} is a seed of `deepcloze finetune`: expected its model, {path / 'model'}")
    if candidates := checkpoint_candidates(path):
        return candidates
    if (path / "hf" / "config.json").is_file():
        raise UserError(f"the checkpoint {path} is incomplete: it has no {COMPLETE} file, so its save did not finish")
    if _is_best(path):
        raise UserError(f"{path} names {_read_best(path)!r}, which is not a complete checkpoint")
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no complete checkpoint")
    if models := sorted(path.glob("seed-*/model")):
        raise UserError(
            f"{path} is a run of `deepcloze finetune`: expected the model of one of its seeds, such as {models[0]}"
        )
    if path.exists():
        raise UserError(f"{path} is neither a Hugging Face folder, a checkpoint nor a run with a complete checkpoint")
    raise missing_model(path)


def missing_model(path: Path) -> UserError:
    """Return the error about a model that does not exist, or not any more."""
    expected = "expected a Hugging Face folder, a checkpoint, a run or a model on the Hub"
    if any(is_checkpoint_name(name) for name in (path.name, path.parent.name)):
        expected = (
            "runs delete old checkpoints, but those of checkpoint.keep_every. Name one that is kept, or a copy by "
            "`deepcloze export`"
        )
    return UserError(f"{path} does not exist: {expected}")


@contextmanager
def deleted_meanwhile(folder: Path) -> Iterator[None]:
    """Raise UserError in place of an error of the block, which reads `folder`, if that does not exist any more: a run
    that trains deletes old checkpoints."""
    try:
        yield
    except Exception:  # libraries raise many types for a missing file
        if folder.exists():
            raise
        why = "a run that trains deletes old checkpoints"
        raise UserError(f"{folder} was deleted while it was read: {why}; run the command again") from None


def mention_best(path: Path, model: Path) -> None:
    """Inform if `path`, which refers to the folder `model`, is a run whose best checkpoint is another one."""
    best = path / "checkpoints" / BEST
    if (found := checkpoint_candidates(best)) and found[0] != model.resolve().parent:
        inform(f"{path}: this is its newest checkpoint; the best one is step {checkpoint_step(found[0]):,}: {best}")


def mention_newer(path: Path, model: Path) -> None:
    """Notify if `path` is a run that has saved newer checkpoints than the one of the folder `model`, which is kept, or
    a file `best` that names another one."""
    if (found := checkpoint_candidates(path)) and found[-1].resolve() != model.resolve().parent:
        notify(
            f"{path}: keeping step {checkpoint_step(model.parent):,}, with which this began; to start from step "
            f"{checkpoint_step(found[-1]):,}, choose another run folder, or remove what has begun"
        )


def checkpoint_candidates(path: Path) -> list[Path]:
    """Return the complete checkpoints that `path` refers to, oldest first: a checkpoint itself, the one that
    `RUN/checkpoints/best` names, or all of a run. Empty if there are none. Does not verify them."""
    if _is_best(path):
        name = _read_best(path)
        if not _NAME.fullmatch(name):
            return []
        path = path.parent / name
    if (path / COMPLETE).exists():
        return [path.resolve()]  # a link may have any name
    return complete_checkpoints(path.absolute() / "checkpoints")


def _is_best(path: Path) -> bool:
    return path.name == BEST and path.is_file()


def _read_best(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def last_usable(candidates: Sequence[Path], verify: Verify, advice: str = "") -> Path:
    """Return the last undamaged one of one or more complete checkpoints; logs a warning for each damaged one it skips.

    Raises UserError, with `advice` at its end, if all are damaged, or if the only one was deleted meanwhile.
    """
    for checkpoint in reversed(candidates):
        if (problem := verify(checkpoint)) is None:
            return checkpoint
        if len(candidates) == 1:
            with deleted_meanwhile(checkpoint):
                raise UserError(f"the checkpoint {checkpoint} is damaged: {problem}{advice}")
        log.warning("skipping damaged checkpoint %s: %s", checkpoint, problem)
    raise UserError(f"all {len(candidates)} checkpoints in {candidates[-1].parent} are damaged{advice}")


def verify(
    checkpoint: Path,
    choose: Callable[[list[str]], Sequence[str]] = list,
    on_progress: Callable[[], None] = lambda: None,
    waits: Sequence[float] = _WAITS,
) -> str | None:
    """Compare a checkpoint with its checksums, and its step with its name. Returns None if it is complete and
    undamaged, else the problem.

    Args:
        choose: selects the files to read, from their sorted paths in the checkpoint; default: all.
        on_progress: called while files are read.
        waits: seconds before a file is read again after an error of the disk.

    Raises HostError if a disk fails, UserError without permission to read: the checkpoint may be undamaged.
    """
    try:
        checksums: dict[str, str] = _read_again(checkpoint / COMPLETE, read_json, waits)
    except (OSError, ValueError) as error:
        _require_damage(error, checkpoint, COMPLETE)
        return f"its {COMPLETE} file cannot be read: {error}"
    if not isinstance(checksums, dict) or not checksums:
        return f"its {COMPLETE} file lists no checksums"
    chosen = choose(sorted(checksums))
    for name in chosen:
        try:
            found = _read_again(checkpoint / name, lambda path: checksum(path, on_progress), waits)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
            _require_damage(error, checkpoint, name)
            return f"{name} cannot be read: {reason(error)}"
        if found != checksums[name]:
            return f"{name} has checksum {found}, expected {checksums[name]}"
    is_unlisted = _STATE not in checksums  # as after a kill while it was replaced
    return verify_name(checkpoint, is_unlisted and any(name.startswith("engine/") for name in chosen))


def _read_again(path: Path, read: Callable[[Path], T], waits: Sequence[float]) -> T:
    """Read a file, and again after errors that may pass, such as those of a network file system."""
    for wait in waits:
        try:
            return read(path)
        except OSError as error:
            if is_damage(error) or error.errno in DENIED:
                raise
            log.warning("%s cannot be read: %s; trying again in %.0f s", path, reason(error), wait)
        time.sleep(wait)
    return read(path)


def _require_damage(error: Exception, checkpoint: Path, name: str) -> None:
    advice = "If the file stays unreadable, move the checkpoint elsewhere to use an earlier one"
    problem = f"{checkpoint / name} cannot be read"
    require_damage(error, problem, f"The checkpoint may be undamaged: try again. {advice}")


def verify_name(checkpoint: Path, has_state: bool = False) -> str | None:
    """Return the problem if a checkpoint has the name of another step; None without one, or if its step is unknown.
    has_state: state.json must be there, which says the step."""
    try:
        step = read_state(checkpoint)["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not has_state:  # not among the files that were to be read
            return None
        _require_damage(error, checkpoint, _STATE)
        return f"its {_STATE} is missing or has no step"
    if _NAME.fullmatch(checkpoint.name) and checkpoint_step(checkpoint) != step:
        return f"its {_STATE} is of step {step}"
    return None


def files_below(folder: str) -> Callable[[list[str]], Sequence[str]]:
    """Let `verify` read one folder of a checkpoint."""
    return lambda names: [name for name in names if name.startswith(f"{folder}/")]


def _verify_model(checkpoint: Path) -> str | None:
    """Run `verify` without the state of the optimizer, which is most of a checkpoint."""
    return verify(checkpoint, lambda names: [name for name in names if not name.startswith("engine/")])


def verify_descriptions(checkpoint: Path) -> str | None:
    """Run `verify` without the tensors: only on the JSON files, which are small."""
    return verify(checkpoint, lambda names: [name for name in names if name.endswith(".json")])


def weights_digest(checkpoint: Path) -> str:
    """Identify the contents of a complete checkpoint's Hugging Face folder. Raises OSError or ValueError if its
    COMPLETE file cannot be read, as after the checkpoint was deleted."""
    if not isinstance(checksums := read_json(checkpoint / COMPLETE), dict):
        raise ValueError(f"its {COMPLETE} file lists no checksums")
    return json_digest({name: value for name, value in checksums.items() if name.startswith("hf/")})


def unlisted_files(model: Path) -> set[Path]:
    """Return files and folders in a Hugging Face folder that its complete checkpoint does not list, so that they are no
    part of it. Empty for a folder that is in no checkpoint."""
    folder = model.resolve()
    try:
        listed = read_json(folder.parent / COMPLETE)
    except (OSError, ValueError):
        return set()
    files = [folder.parent / name for name in files_below(folder.name)(list(listed))]
    known = {path for file in files for path in (file, *file.parents)}
    return {path for path in model.rglob("*") if files and folder / path.relative_to(model) not in known}


def link_model(checkpoint: Path, folder: Path) -> None:
    """Make `folder` a complete checkpoint that has only the Hugging Face folder, which stays when the original is
    deleted. Its files are hard links, or copies on a file system without them; they must not be changed."""
    unlisted = unlisted_files(checkpoint / "hf")
    for source in [*paths_below(checkpoint / "hf"), checkpoint / COMPLETE]:
        if source.is_dir() or source in unlisted:
            continue
        target = folder / source.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read state.json: everything in a checkpoint that is not a tensor."""
    state: dict[str, Any] = read_json(checkpoint / _STATE)
    return state


def state_around(model: Path) -> dict[str, Any]:
    """Read state.json of the checkpoint that a Hugging Face folder is in; empty if there is none."""
    path = model.resolve().parent / _STATE
    try:
        state: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    return state if "identity" in state else {}  # a file of another program, such as `datasets`


def replace_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Replace state.json of a complete checkpoint, which is usable at every moment."""
    checksums: dict[str, str] = read_json(checkpoint / COMPLETE)
    write_json(checkpoint / COMPLETE, {name: checksums[name] for name in checksums if name != _STATE}, indent=1)
    write_json(checkpoint / _STATE, state, indent=1)
    list_state(checkpoint)


def list_state(checkpoint: Path) -> None:
    """Finish a `replace_state` that was interrupted: a copy has only the files that COMPLETE lists."""
    checksums: dict[str, str] = read_json(checkpoint / COMPLETE)
    if _STATE not in checksums:
        write_json(checkpoint / COMPLETE, checksums | {_STATE: checksum(checkpoint / _STATE)}, indent=1)


def mark_complete(checkpoint: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Make a folder a complete checkpoint: fsync everything in it, then write its checksums. `known`: checksums of
    files that need not be read again, by path in the checkpoint. Raises OSError, also if a network disk does not list
    one of these yet."""
    files = {str(path.relative_to(checkpoint)): path for path in paths_below(checkpoint) if path.is_file()}
    if unlisted := sorted(known.keys() - files.keys()):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(checkpoint / unlisted[0]))
    fsync_tree(checkpoint)
    checksums = {name: known.get(name) or checksum(path) for name, path in files.items()}
    write_json(checkpoint / COMPLETE, checksums, indent=1)


def write_best(checkpoints: Path, step: int) -> None:
    """Let `RUN/checkpoints/best` name the checkpoint of `step`, unless it is missing because it could not be saved."""
    checkpoint = checkpoint_path(checkpoints, step)
    if (checkpoint / COMPLETE).exists():
        write_text(checkpoints / BEST, f"{checkpoint.name}\n")


def named_best(checkpoints: Path) -> Path | None:
    """Return the checkpoint that `RUN/checkpoints/best` names."""
    return checkpoints / _read_best(checkpoints / BEST) if _is_best(checkpoints / BEST) else None


def checkpoint_step(checkpoint: Path | str) -> int:
    return int(Path(checkpoint).name.removeprefix("step-"))
