"""The runs of a comparison, all checked before the first one starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.checkpoints import find_model_folder
from experiment.config import load_config
from experiment.errors import UserError
from experiment.files import checksum
from experiment.own_process import module_command
from experiment.run_folder import RunFolder, folder_name
from finetune.config import FinetuneConfig
from finetune.data.checksums import data_checksums
from finetune.model import model_files
from finetune.run import check_data
from launcher.comparison.compare_config import CompareConfig, RowConfig
from launcher.options import CompareOptions, LaunchOptions
from launcher.sweeps.sweep_grid import grid_points, parse_grid
from launcher.sweeps.sweep_plan import FlatConfig, validate_finetuning, validate_pretraining

_COMMAND = module_command("launcher")
_IRRELEVANT = ("run.", "tracking.")  # keys that do not change scores
_PRETRAINING = "pretrain"  # folder, beside those of the tasks
_USED = ("compare.csv", "compare.json", "compare.md", "logs", "report", "runs.json")  # beside the folders of the rows


@dataclass(frozen=True)
class PlannedRun:
    """A pretraining, a fine-tuning run, or a sweep of them."""

    name: str  # ROW/TASK, or ROW/pretrain: its folder in that of the comparison
    folder: RunFolder
    argv: tuple[str, ...]  # the command that starts or resumes it
    config: FlatConfig  # and checksums of what it reads, see DIR/runs.json


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


@dataclass(frozen=True)
class _Task:
    """A column of the table."""

    name: str  # of its folders
    file: str
    data: FlatConfig  # data.SPLIT -> checksum


def plan_comparison(options: CompareOptions) -> ComparePlan:
    """Validate all runs and read their data. Writes and starts nothing.

    Raises UserError for what would keep a run from starting.
    """
    config = load_config(CompareConfig, options.file, options.overrides)
    placement = options.model_dump(include=set(LaunchOptions.model_fields), exclude_defaults=True)
    if placement and all(row.pretrain is None for row in config.rows.values()):
        raise UserError(f"--{next(iter(placement))} applies to pretraining, and no row of {options.file} has any")
    folder = RunFolder(Path(config.run.dir).absolute())
    row_folders = _row_folders(list(config.rows))
    config = _find_encoders(config, options.file)
    tasks = _read_tasks(config)
    rows = []
    for name, row in config.rows.items():
        try:
            rows.append(_plan_row(name, row, folder.path, row_folders[name], tasks, config, placement))
        except UserError as error:
            raise UserError(f"{options.file}: rows.{name}: {error}") from None
    return ComparePlan(folder, tuple(rows), config.grid is not None)


def _find_encoders(config: CompareConfig, file: str) -> CompareConfig:
    """The config with the Hugging Face folder that each `init_from` refers to now: all cells of a row start from the
    same checkpoint, although a run may save newer ones meanwhile. Raises UserError."""
    rows = {}
    for name, row in config.rows.items():
        try:
            folder = find_model_folder(Path(row.init_from)).absolute()
        except UserError as error:
            raise UserError(f"{file}: rows.{name}.init_from: {error}") from None
        rows[name] = row.model_copy(update={"init_from": str(folder)})
    return config.model_copy(update={"rows": rows})


def _folders(key: str, names: Sequence[str]) -> dict[str, str]:
    """Name -> name of its folder. Raises UserError if two would share one."""
    folders = {name: folder_name(name) for name in names}
    for name, folder in folders.items():
        if not folder:
            raise UserError(f"{key}: expected a name with letters or digits, found '{name}'")
        if others := [other for other in names if other != name and folders[other] == folder]:
            raise UserError(f"{key}: '{name}' and '{others[0]}' would share the folder '{folder}'; rename one")
    return folders


def _row_folders(names: Sequence[str]) -> dict[str, str]:
    """Name -> name of its folder. Raises UserError as `_folders`, and for a name that the comparison itself uses."""
    folders = _folders("rows", names)
    for name, folder in folders.items():
        if folder in _USED:
            raise UserError(f"rows: '{name}' is the name of a file or folder of the comparison; rename this row")
    return folders


def _read_tasks(config: CompareConfig) -> list[_Task]:
    """Raises UserError for data that are not valid, and if two tasks have the same name."""
    encoder = next(iter(config.rows.values())).init_from  # the data are valid for all encoders or for none
    replaced = {"run.dir": ".", "model.init_from": encoder}  # a file may leave them out
    loaded = [load_config(FinetuneConfig, file, replaced) for file in config.tasks]
    names = [task.task.name or Path(file).stem for file, task in zip(config.tasks, loaded, strict=True)]
    for name in names:
        if names.count(name) > 1 or name == _PRETRAINING:
            raise UserError(f"tasks: the name '{name}' is used twice; set task.name in one of the files")
    folders = _folders("tasks", names)
    return [
        _Task(folders[name], file, _read_data(file, task))
        for name, file, task in zip(names, config.tasks, loaded, strict=True)
    ]


def _read_data(file: str, config: FinetuneConfig) -> FlatConfig:
    """data.SPLIT -> checksum. Raises UserError for data that are not valid."""
    try:
        check_data(config)
        return {f"data.{split}": found for split, found in data_checksums(config.task).items()}
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _plan_row(
    name: str,
    row: RowConfig,
    parent: Path,
    folder: str,
    tasks: Sequence[_Task],
    config: CompareConfig,
    placement: Mapping[str, Any],
) -> Row:
    pretraining, origin = None, _encoder_checksums(row)
    if row.pretrain is not None:
        run = f"{folder}/{_PRETRAINING}"
        pretraining = _plan_pretraining(row.pretrain, row.init_from, run, RunFolder(parent / run), placement)
        origin |= {f"pretrain.{key}": value for key, value in pretraining.config.items()}
    seeds = ",".join(map(str, config.seeds))
    now = {"model.init_from": row.init_from, "model.weights": row.weights, "training.seeds": seeds}
    then = now if pretraining is None else {**now, "model.init_from": str(pretraining.folder.path)}
    cells = {}
    for task in tasks:
        path = parent / folder / task.name
        checked = _check_cell(task.file, now, path, config.grid)
        argv = _cell_argv(task.file, then, path, config.grid)
        all_keys = {**checked, **task.data, **origin, **then}
        cells[task.name] = PlannedRun(f"{folder}/{task.name}", RunFolder(path), argv, all_keys)
    return Row(name, pretraining, cells)


def _encoder_checksums(row: RowConfig) -> dict[str, object]:
    """encoder.FILE -> checksum."""
    files = model_files(Path(row.init_from), weights=row.weights == "pretrained")
    return {f"encoder.{path.name}": checksum(path) for path in files}


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
