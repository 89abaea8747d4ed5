"""The runs of a comparison, all checked before the first one starts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.config import load_config
from experiment.errors import UserError
from experiment.run_folder import RunFolder, folder_name
from finetune.config import FinetuneConfig
from launcher.comparison.compare_config import CompareConfig, RowConfig
from launcher.options import CompareOptions, LaunchOptions
from launcher.sweeps.sweep_grid import grid_points, parse_grid
from launcher.sweeps.sweep_plan import FlatConfig, validate_finetuning, validate_pretraining

_COMMAND = (sys.executable, "-m", "launcher")
_IRRELEVANT = ("run.", "tracking.")  # keys that do not change scores
_PRETRAINING = "pretrain"  # folder, beside those of the tasks


@dataclass(frozen=True)
class PlannedRun:
    """A pretraining, a fine-tuning run, or a sweep of them."""

    name: str  # ROW/TASK, or ROW/pretrain: its folder in that of the comparison
    folder: RunFolder
    argv: tuple[str, ...]  # the command that starts or resumes it
    config: FlatConfig


@dataclass(frozen=True)
class Row:
    """What is run for a row, in order."""

    name: str
    pretraining: PlannedRun | None
    cells: Mapping[str, PlannedRun]  # by task


@dataclass(frozen=True)
class ComparePlan:
    """The validated runs of a comparison."""

    folder: RunFolder
    rows: tuple[Row, ...]
    grid: bool  # whether a cell is a sweep


def plan_comparison(options: CompareOptions) -> ComparePlan:
    """Validate all runs. Writes and starts nothing. Raises UserError for what would keep one from starting."""
    config = load_config(CompareConfig, options.file, options.overrides)
    placement = options.model_dump(include=set(LaunchOptions.model_fields), exclude_defaults=True)
    if placement and all(row.pretrain is None for row in config.rows.values()):
        raise UserError(f"--{next(iter(placement))} applies to pretraining, and no row of {options.file} has any")
    folder = RunFolder(Path(config.run.dir).absolute())
    tasks = dict(zip(_task_folders(config), config.tasks, strict=True))
    row_folders = _folders("rows", list(config.rows))
    rows = []
    for name, row in config.rows.items():
        try:
            rows.append(_plan_row(name, row, folder.path, row_folders[name], tasks, config, placement))
        except UserError as error:
            raise UserError(f"{options.file}: rows.{name}: {error}") from None
    return ComparePlan(folder, tuple(rows), config.grid is not None)


def _folders(key: str, names: Sequence[str]) -> dict[str, str]:
    """Name -> name of its folder. Raises UserError if two would share one."""
    folders = {name: folder_name(name) for name in names}
    for name, folder in folders.items():
        if not folder:
            raise UserError(f"{key}: expected a name with letters or digits, found '{name}'")
        if others := [other for other in names if other != name and folders[other] == folder]:
            raise UserError(f"{key}: '{name}' and '{others[0]}' would share the folder '{folder}'; rename one")
    return folders


def _task_folders(config: CompareConfig) -> list[str]:
    """The names of the tasks, as folders. Raises UserError if two have the same name."""
    replaced = {"run.dir": ".", "model.init_from": "."}  # a file may leave them out
    found = [load_config(FinetuneConfig, file, replaced).task.name or Path(file).stem for file in config.tasks]
    for name in found:
        if found.count(name) > 1 or name == _PRETRAINING:
            raise UserError(f"tasks: the name '{name}' is used twice; set task.name in one of the files")
    return list(_folders("tasks", found).values())


def _plan_row(
    name: str,
    row: RowConfig,
    parent: Path,
    folder: str,
    tasks: Mapping[str, str],
    config: CompareConfig,
    placement: Mapping[str, Any],
) -> Row:
    """tasks: name -> file."""
    init_from = str(Path(row.init_from).absolute())
    pretraining = None
    if row.pretrain is not None:
        run = f"{folder}/{_PRETRAINING}"
        pretraining = _plan_pretraining(row.pretrain, init_from, run, RunFolder(parent / run), placement)
    seeds = ",".join(map(str, config.seeds))
    now = {"model.init_from": init_from, "model.weights": row.weights, "training.seeds": seeds}
    then = now if pretraining is None else {**now, "model.init_from": str(pretraining.folder.path)}
    cells = {}
    for task, file in tasks.items():
        path = parent / folder / task
        checked = _check_cell(file, now, path, config.grid)
        argv = _cell_argv(file, then, path, config.grid)
        cells[task] = PlannedRun(f"{folder}/{task}", RunFolder(path), argv, {**checked, **then})
    return Row(name, pretraining, cells)


def _plan_pretraining(
    file: str, init_from: str, name: str, folder: RunFolder, placement: Mapping[str, Any]
) -> PlannedRun:
    overrides = {"model.init_from": init_from, "run.dir": str(folder.path)}
    config = validate_pretraining(file, placement)(overrides)
    flags = [f"--{key}={value}" for key, value in {**placement, **overrides}.items()]
    return PlannedRun(name, folder, (*_COMMAND, "pretrain", "--config", file, *flags), config)


def _check_cell(file: str, overrides: Mapping[str, str], folder: Path, grid: str | None) -> FlatConfig:
    """The config of a cell, as flat keys. Raises UserError for one that is not valid, at any point of the grid."""
    validate = validate_finetuning(file)
    for point in grid_points(parse_grid(grid)).values() if grid is not None else ():
        validate({**overrides, "run.dir": str(folder), **point})
    config = validate({**overrides, "run.dir": str(folder)})
    return {**{key: value for key, value in config.items() if not key.startswith(_IRRELEVANT)}, "grid": grid}


def _cell_argv(file: str, overrides: Mapping[str, str], folder: Path, grid: str | None) -> tuple[str, ...]:
    flags = [f"--{key}={value}" for key, value in overrides.items()]
    if grid is None:
        return (*_COMMAND, "finetune", "--config", file, f"--run.dir={folder}", *flags)
    return (*_COMMAND, "sweep", "--config", file, f"--grid={grid}", f"--output={folder}", *flags)
