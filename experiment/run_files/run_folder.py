"""The run folder: names of all files that a run writes."""

import os
import re
import shlex
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiment.errors import UserError
from experiment.files import created_parents, names_in, read_json

RunKind = Literal["pretraining run", "fine-tuning run"]

SWEEP_RECORD = "sweep.json"
COMPARISON_RECORD = "runs.json"
"""Files in the folder of a sweep or comparison that list its runs."""

_CONTENTS = {
    "config.json": "model",
    "manifest.json": "corpus",
    "checkpoints": "pretraining run",
    "seed-*/COMPLETE": "fine-tuning run",
}
"""Files and folders -> the kind of a folder with them."""
_SEED = re.compile(r"seed-(0|[1-9][0-9]*)")


class _Below:
    """A file or folder below the folder of the run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", owner: object) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run. Creates nothing."""

    path: Path

    config = _Below("config.yaml")
    provenance = _Below("provenance.json")
    metrics = _Below("metrics.jsonl")
    results = _Below("results.json")
    """The scores of a fine-tuning run."""
    tensorboard = _Below("tensorboard")
    wandb = _Below("wandb")
    checkpoints = _Below("checkpoints")
    report = _Below("report")
    logs = _Below("logs")
    launches = _Below("launch.jsonl")
    goodput = _Below("logs/goodput.jsonl")
    """Time of the attempts by activity, see `goodput`."""
    fillings = _Below("logs/fillings.jsonl")
    """Words that checkpoints fill into held-out sentences, see `run_files.fillings`."""
    launch_output = _Below("logs/launch.log")
    """The output of the last launch, if it was in the background."""
    downstream = _Below("downstream")
    """Scores of checkpoints on tasks, written by `deepcloze watch`, see `run_files.downstream`."""
    saved = _Below(".saved")
    """Empty; exists once the run has saved a checkpoint, or resumed from one."""
    stop = _Below("STOP")
    """Created by the user, or by the launcher on a signal: save a checkpoint and stop."""
    outcome = _Below("logs/outcome.json")
    """The outcome of the run, see `outcome_file`."""
    restored = _Below("logs/restored")
    """The path of the folder, if it was copied from `checkpoint.mirror`."""
    reserved_outcome = _Below("logs/.outcome.reserved")
    """Space for `outcome`, in case the disk fills up."""
    trials = _Below("logs/autotune")
    """Folder of the trials of `--autotune`; removed at the end."""
    profile = _Below("profile")
    """Profile of a few steps, see `pretrain.training.profiler`."""
    lock = _Below("logs/launch.lock")
    """Locked by the process that writes to the folder, see `run_lock`."""
    processes_lock = _Below("logs/processes.lock")
    """Locked by the ranks of a launch, see `run_lock`."""
    owner = _Below("logs/launch.owner")
    """Renewed by the process that writes to the folder, for other machines, see `run_lock`."""

    def seed_folder(self, seed: int) -> Path:
        """Return the folder of a finished fine-tuning seed."""
        return self.path / f"seed-{seed}"

    @property
    def finished_seeds(self) -> dict[int, Path]:
        """Seed -> the file that marks a finished fine-tuning seed as complete. Copies of a seed do not count."""
        seeds = [int(name[1]) for name in map(_SEED.fullmatch, names_in(self.path)) if name is not None]
        paths = {seed: self.seed_folder(seed) / "COMPLETE" for seed in seeds}
        return {seed: path for seed, path in paths.items() if path.exists()}

    def bad_batch(self, step: int) -> Path:
        """Return the folder with a dump of the bad batch of this step."""
        return self.path / "health" / f"step-{step:08d}"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_record(self, rank: int) -> Path:
        """Return the process of a rank, see `outcome_file.RankRecord`."""
        return self.logs / f"rank-{rank}.json"

    def heartbeat(self, rank: int) -> Path:
        """Return the activity of a rank, see `heartbeat.Heartbeat`."""
        return self.logs / f"rank-{rank}.beat"


def planned_folders(folder: Path) -> list[Path]:
    """Return the run folders of a sweep or comparison, also of runs that have not started; empty if it is none."""
    for name in (SWEEP_RECORD, COMPARISON_RECORD):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = read_json(folder / name)
            return [folder / run for run in (content["runs"] if name == SWEEP_RECORD else content)]
    return []


def is_run(folder: RunFolder) -> bool:
    """Return whether the folder has something that only a run has. Sweeps and comparisons have logs, too."""
    known = (folder.config, folder.metrics, folder.launches)
    logs = (folder.lock, folder.processes_lock, folder.rank_log(0))  # a folder of runs may have logs of the user
    return any(path.exists() for path in known) or (
        any(path.exists() for path in logs) and not planned_folders(folder.path)
    )


def open_folder(run: str | Path) -> RunFolder:
    """Open a run folder. Raises UserError if there is none."""
    folder = RunFolder(Path(run).absolute())
    if not folder.path.is_dir():
        raise UserError(f"there is no run folder {folder.path}")
    return folder


def runs_in(folder: str | Path) -> list[Path]:
    """Return a run, the runs of a sweep or comparison, or all runs of a folder with any of these; none for a file.

    Raises UserError if the folder does not exist.
    """
    if Path(folder).is_file():  # named by a pattern such as runs/*
        return []
    open_folder(folder)
    if found := _runs_in(Path(folder)):
        return found
    return [run for child in sorted(Path(folder).iterdir()) if child.is_dir() for run in _runs_in(child)]


def _runs_in(folder: Path) -> list[Path]:
    with suppress(PermissionError):  # a folder of another user, or lost+found
        if is_run(RunFolder(folder)):
            return [folder]
        return [run for planned in planned_folders(folder) for run in _runs_in(planned) or [planned]]
    return []


def folder_name(text: str) -> str:
    """Return a name for a folder: letters, digits and any of _.+- of a text; empty if it has none."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def check_run_folder(folder: RunFolder, kind: RunKind | None, key: str = "run.dir") -> None:
    """Raise UserError for a folder that holds something else than a run of this kind, such as a corpus, or files that
    the run would replace, and for a file. None: a sweep or comparison, which replace none. key: of the folder, for
    messages."""
    if folder.path.is_file():
        raise UserError(f"{key}: {folder.path} is a file; expected a folder")
    is_run = False
    for pattern, content in _CONTENTS.items():
        found = next(folder.path.glob(pattern), None)
        if found is not None and content != kind:
            raise UserError(f"{key}: {folder.path} holds a {content} ({pattern}); choose another folder")
        is_run |= found is not None
    # A run writes its provenance before the others. A folder that was copied without it has checkpoints or seeds.
    for path in (folder.config, folder.metrics):
        if kind and not is_run and path.exists() and not (folder.provenance.exists() or folder.restored.exists()):
            raise UserError(
                f"{key}: {folder.path} holds a {path.name} that no run has written; move it or choose another folder"
            )


def check_not_moved(config: str | Path, overrides: Collection[str], folder: RunFolder) -> None:
    """Raise UserError for RUN/config.yaml of a run that was moved: it would start another run in the old folder.

    Args:
        overrides: keys that override the config.
        folder: `run.dir` of the config.
    """
    moved = RunFolder(Path(config).absolute().parent)
    if "run.dir" in overrides or moved.config.name != Path(config).name or not moved.provenance.exists():
        return
    with suppress(PermissionError):  # a folder of another user, where the run is not
        if is_run(folder):
            return
    if not moved.logs.is_dir():  # a mirror has the other files, too
        return
    raise UserError(
        f"run.dir: {config} belongs to a run that was in {folder.path}, and is not there now: to resume it, add "
        f"--run.dir={shlex.quote(str(moved.path))}"
    )


def check_creatable(folder: RunFolder) -> None:
    """Raise UserError if the folder is not writable, or is missing and cannot be created. Leaves no folder."""
    try:
        with created_parents(folder.logs):
            pass
    except OSError as error:
        raise UserError(f"run.dir: cannot create the run folder {folder.path}: {error.strerror}") from None
    if folder.path.exists():
        _check_writable(folder)


def open_run_folder(path: Path | str) -> RunFolder:
    """Return the run folder at `path`, created if needed. Raises UserError if it is not writable."""
    folder = RunFolder(Path(path).absolute())
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: cannot create the run folder {folder.path}: {error.strerror}") from None
    _check_writable(folder)
    return folder


def _check_writable(folder: RunFolder) -> None:
    if not os.access(folder.path, os.W_OK):
        raise UserError(f"run.dir: the run folder {folder.path} is not writable")
