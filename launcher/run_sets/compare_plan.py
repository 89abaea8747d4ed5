"""The runs of a comparison, all validated before the first one starts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.config import FlatConfig, flatten, load_config, read_config_file
from experiment.errors import UserError, user_errors_in, warn_once
from experiment.formatting import shorten
from experiment.models.model_folder import load_model_config
from experiment.models.model_names import local_model
from experiment.process.own_process import deepcloze_command
from experiment.run_files.checkpoints import BEST, checkpoint_candidates, find_model_folder
from experiment.run_files.run_folder import COMPARISON_RECORD, RunFolder, check_run_folder, folder_name
from finetune.config import FinetuneConfig
from finetune.device import choose_device
from finetune.resolve import check_data, load_run_config
from launcher.options import CompareOptions, LaunchOptions
from launcher.run_sets.compare_config import CompareConfig, RowConfig
from launcher.run_sets.recorded_runs import (
    record_model_of_set,
    record_parent_of_set,
    recorded_configs,
    recorded_data,
    resume_overrides,
)
from launcher.run_sets.run_set import CONFIG_COPIES, PlannedRun, RunSet, is_finished
from launcher.run_sets.sweep import check_points, parse_grid, read_grid
from launcher.run_sets.validation import data_origin, encoder_origin, validate_finetuning, validate_pretraining
from pretrain.config import PretrainConfig

_IRRELEVANT = ("run.", "tracking.")  # keys that do not change scores
_ROWS_SHOWN = 300  # characters of the rows of a warning
_PRETRAINING = "pretrain"  # folder, beside the folders of the tasks
_CHECKPOINT = "pretrain.checkpoint"  # key of tasks that start from the best one; those of version 0.2.0 never did
# Beside the folders of the rows: of the comparison, or what would make its folder one of another kind.
_USED = (
    *("compare.csv", "compare.json", "compare.md", "compare.png", "logs", "report", CONFIG_COPIES, COMPARISON_RECORD),
    *("checkpoints", "config.json", "config.yaml", "launch.jsonl", "manifest.json", "metrics.jsonl"),
)


@dataclass(frozen=True)
class ComparePlan:
    """The validated runs of a comparison, named ROW/TASK and ROW/pretrain after their folders."""

    runs: RunSet
    cells: Mapping[str, Mapping[str, PlannedRun]]  # row -> task -> its fine-tuning run, or a sweep of them
    grid: bool  # whether a cell is a sweep
    files: Mapping[str, Mapping[str, str]]  # task -> split -> where its data are now


@dataclass(frozen=True)
class _Task:
    """A column of the table."""

    name: str  # of its folders
    file: str
    files: Mapping[str, str]  # split -> file
    data: FlatConfig  # data.SPLIT -> checksum
    pinned: Mapping[str, str]  # overrides with the commits of data sets of the Hub
    is_trained: bool


def plan_comparison(options: CompareOptions) -> ComparePlan:
    """Validate all runs and read their data. Writes and starts nothing. Raises UserError for anything that would keep a
    run from starting."""
    config = load_config(CompareConfig, options.file, options.overrides)
    placement = options.model_dump(include=set(LaunchOptions.model_fields), exclude_defaults=True)
    if placement and all(row.pretrain is None for row in config.rows.values()):
        raise UserError(f"--{next(iter(placement))} applies to pretraining, and no row of {options.file} has any")
    folder = RunFolder(Path(config.run.dir).absolute())
    check_run_folder(folder, None)
    row_folders = _folders("rows", list(config.rows))
    if used := [name for name, row_folder in row_folders.items() if row_folder in _USED]:
        raise UserError(f"rows: '{used[0]}' is the name of a file or folder of the comparison; rename this row")
    recorded = recorded_configs(folder.path / COMPARISON_RECORD, "run.dir")
    forks = _find_forks(config, options.file, row_folders, recorded)
    config = _find_encoders(config, options.file, row_folders, recorded, forks)
    files = [*config.tasks, *(row.pretrain for row in config.rows.values() if row.pretrain is not None)]
    configs = {file: read_config_file(file) for file in files}
    tasks = _read_tasks(config, recorded_data(recorded))
    runs: list[PlannedRun] = []
    cells: dict[str, dict[str, PlannedRun]] = {}
    models: set[str] = set()
    for name, row in config.rows.items():
        with user_errors_in(f"{options.file}: rows.{name}"):
            _, forked = forks.get(name, (None, None))
            pretraining = _plan_pretraining(row, folder.path, row_folders[name], placement, recorded, forked)
            cells[name] = _plan_cells(
                row, pretraining, folder.path / row_folders[name], tasks, config, models, recorded
            )
        runs += [*([pretraining] if pretraining is not None else []), *cells[name].values()]
    if trained := [task for task in tasks if task.is_trained]:
        dropout = {name: _dropout_of_model(row.init_from) for name, row in config.rows.items()}
        for task in trained:
            of_rows = {name: found[task.name].config for name, found in cells.items()}
            _warn_of_dropout(task, config.grid, dropout, of_rows)
    run_set = RunSet("compare", folder, "run.dir", COMPARISON_RECORD, tuple(runs), configs=configs)
    return ComparePlan(run_set, cells, config.grid is not None, {task.name: task.files for task in tasks})


def _find_forks(
    config: CompareConfig, file: str, folders: Mapping[str, str], recorded: Mapping[str, FlatConfig]
) -> dict[str, tuple[str, str]]:
    """Return `RunConfig.parent` of rows that fork a run, and the checkpoint that it referred to when the first of them
    began. folders: by row. Raises UserError."""
    runs: dict[str, tuple[str, str]] = {}  # row -> `run.resume`, parent
    began: dict[tuple[str, str], list[FlatConfig]] = {}
    for name, row in config.rows.items():
        if row.pretrain is not None:
            with user_errors_in(f"{file}: rows.{name}"):
                overrides = {"model.init_from": row.init_from, "run.dir": "."}
                run = load_config(PretrainConfig, row.pretrain, overrides).run
            if run.parent is not None:
                runs[name] = key = run.resume, run.parent
                began.setdefault(key, []).append(recorded.get(f"{folders[name]}/{_PRETRAINING}", {}))
    with user_errors_in(f"{file}: run.resume"):
        checkpoints = {key: record_parent_of_set(*key, same) for key, same in began.items()}
    return {name: (key[1], checkpoints[key]) for name, key in runs.items()}


def _find_encoders(
    config: CompareConfig,
    file: str,
    folders: Mapping[str, str],
    recorded: Mapping[str, FlatConfig],
    forks: Mapping[str, tuple[str, str]],
) -> CompareConfig:
    """Return the config with the model that each `init_from` referred to when its row began: all cells of a row start
    from the same checkpoint, although a run may save newer ones meanwhile. That of a run which the row also forks is
    the forked one. folders: by row. forks: see `_find_forks`. Raises UserError."""
    rows = {}
    for name, row in config.rows.items():
        same = [found for run, found in recorded.items() if run.startswith(f"{folders[name]}/")]
        parent, checkpoint = forks.get(name, ("", ""))
        forked = Path(checkpoint).absolute() / "hf"
        if parent and Path(parent).resolve() == Path(row.init_from).resolve() and forked.is_dir():
            model = str(forked)
        else:
            with user_errors_in(f"{file}: rows.{name}.init_from"):
                model = record_model_of_set(row.init_from, recorded, same)
        rows[name] = row.model_copy(update={"init_from": model})
    return config.model_copy(update={"rows": rows})


def _folders(key: str, names: Sequence[str]) -> dict[str, str]:
    """Return name -> name of its folder. Raises UserError if two would share one."""
    folders = {name: folder_name(name) for name in names}
    for name, folder in folders.items():
        if not folder:
            raise UserError(f"{key}: expected a name with letters or digits, found '{name}'")
        if others := [other for other in names if other != name and folders[other] == folder]:
            raise UserError(f"{key}: '{name}' and '{others[0]}' would share the folder '{folder}'; rename one")
    return folders


def _read_tasks(config: CompareConfig, recorded: Sequence[str]) -> list[_Task]:
    """Read the tasks. recorded: see `recorded_data`. Raises UserError for invalid data and names."""
    encoder = next(iter(config.rows.values())).init_from  # the data are valid for all encoders or for none
    replaced = {"run.dir": ".", "model.init_from": encoder}  # a file may leave them out
    loaded = [load_config(FinetuneConfig, file, replaced) for file in config.tasks]
    names = [task.task.name or Path(file).stem for file, task in zip(config.tasks, loaded, strict=True)]
    folders = _folders("tasks", names)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: the name '{name}' is used twice; set task.name in one of the files")
        if folders[name] == _PRETRAINING:
            raise UserError(f"tasks: the folder '{_PRETRAINING}' of '{name}' is for pretraining runs; set task.name")
    tasks = []
    for name, file, task_config in zip(names, config.tasks, loaded, strict=True):
        with user_errors_in(file):
            task = task_config.task.pinned(recorded)
            check_data(task_config.model_copy(update={"task": task}))
            origin, pinned = data_origin(task), task.hub_overrides()
            tasks.append(_Task(folders[name], file, task.files(), origin, pinned, task.is_trained))
    return tasks


def _plan_pretraining(
    row: RowConfig,
    parent: Path,
    folder: str,
    placement: Mapping[str, Any],
    recorded: Mapping[str, FlatConfig],
    forked: str | None,
) -> PlannedRun | None:
    """Return the pretraining of a row, if any. forked: the checkpoint that it forks, if any. Raises UserError."""
    if row.pretrain is None:
        return None
    name = f"{folder}/{_PRETRAINING}"
    overrides = {"model.init_from": row.init_from, "run.dir": str(parent / name)}
    loaded = load_config(PretrainConfig, row.pretrain, overrides)
    if loaded.checkpoint.mirror is not None:
        overrides["checkpoint.mirror"] = f"{loaded.checkpoint.mirror}/{name}"
    if forked is not None:
        overrides["run.resume"] = forked
    overrides |= resume_overrides(loaded.run.resume, name, parent, recorded)
    config = validate_pretraining(row.pretrain, overrides, placement, name in recorded)
    return PlannedRun(name, deepcloze_command("pretrain", row.pretrain, {**placement, **overrides}), config)


def _plan_cells(
    row: RowConfig,
    pretraining: PlannedRun | None,
    folder: Path,
    tasks: Sequence[_Task],
    config: CompareConfig,
    models: set[str] | None,
    recorded: Mapping[str, FlatConfig],
) -> dict[str, PlannedRun]:
    """Return the runs of a row by task. Their configs have the checksums of all files that they read.

    folder: of the row. models: see `check_model`. recorded: `recorded_configs` of the comparison; tasks of a row start
    from the same checkpoint. Raises UserError."""
    parent = folder.parent
    origin = encoder_origin(row.init_from, row.weights)
    seeds = ",".join(map(str, config.seeds))
    now = {"model.init_from": row.init_from, "model.weights": row.weights, "training.seeds": seeds}
    then = now
    if pretraining is not None:
        origin = {**origin, **{f"pretrain.{key}": value for key, value in pretraining.config.items()}}
        began = [recorded.get(f"{folder.name}/{task.name}", {_CHECKPOINT: BEST}) for task in tasks]
        has_best = pretraining.config["evaluation.best_metric"] is not None and all(_CHECKPOINT in run for run in began)
        origin |= {_CHECKPOINT: BEST} if has_best else {}
        run = parent / pretraining.name
        then = {**now, "model.init_from": str(run / "checkpoints" / BEST if has_best else run)}
        if pretraining.config["model.max_positions"] is not None:
            models = None  # it gets its positions from the pretraining
    cells = {}
    for task in tasks:
        name = f"{folder.name}/{task.name}"
        pinned = task.pinned
        checked = _check_cell(task.file, {**now, **pinned}, parent / name, config.grid, models)
        in_grid = config.grid is not None and "task.pooling" in parse_grid(config.grid)
        if pretraining is not None and "task.pooling" in checked and not in_grid:
            # A pretraining does not keep that of the sentence-transformers model that it continues.
            pinned = {**pinned, "task.pooling": str(checked["task.pooling"])}
        argv = _cell_argv(task.file, {**then, **pinned}, parent / name, config.grid)
        all_keys = {**checked, **task.data, **origin, "model.init_from": then["model.init_from"]}
        cells[task.name] = PlannedRun(name, argv, all_keys, pretraining.name if pretraining is not None else None)
    is_read = any(not is_finished(cell, RunFolder(parent / cell.name)) for cell in cells.values())
    is_done = pretraining is not None and is_finished(pretraining, RunFolder(parent / pretraining.name))
    if is_read and is_done and not checkpoint_candidates(path := Path(then["model.init_from"])):  # deleted since
        find_model_folder(path)  # raises
    return cells


def _warn_of_dropout(
    task: _Task, grid: str | None, of_models: Mapping[str, Mapping[str, object]], cells: Mapping[str, FlatConfig]
) -> None:
    """Warn if rows would be fine-tuned with different dropout, which is that of their models. cells: by row."""
    in_grid = parse_grid(grid) if grid is not None else {}
    dropout = {row: _dropout(of_models[row], cell, in_grid) for row, cell in cells.items()}
    first, *others = dropout.values()
    if any(other.keys() != first.keys() for other in others):
        values = [value for fields in dropout.values() for value in fields.values() if value is not None]
        if any(value != values[0] for value in values):
            of_rows = {row: ", ".join(f"{key} {value}" for key, value in dropout[row].items()) for row in dropout}
            shown = shorten("; ".join(f"{row}: {fields}" for row, fields in of_rows.items()), _ROWS_SHOWN)
            warn_once(f"{task.file}: the rows have different kinds of dropout, which no key sets for all: {shown}")
    elif differ := [field for field in first if any(other[field] != first[field] for other in others)]:
        shown = shorten(", ".join(f"{fields[differ[0]]} in {row}" for row, fields in dropout.items()), _ROWS_SHOWN)
        warn_once(
            f"{task.file}: the rows have different dropout: {differ[0]} is {shown}; to train them alike, set "
            f"{', '.join(f'model.config.{field}' for field in differ)}"
        )


def _dropout(of_model: Mapping[str, object], cell: FlatConfig, in_grid: Collection[str]) -> dict[str, object]:
    """Return the fields for dropout that a cell is trained with, except those in the grid. `classifier_dropout` is
    None, which stands for `hidden_dropout_prob`, if the two are equal."""
    fields: dict[str, object] = {}
    for field, value in of_model.items():
        if f"model.config.{field}" not in in_grid:
            keys = (f"model.config.{field}", f"pretrain.model.config.{field}")
            fields[field] = next((cell[key] for key in keys if key in cell), value)
    if "classifier_dropout" in fields and fields["classifier_dropout"] == fields.get("hidden_dropout_prob"):
        fields["classifier_dropout"] = None
    return fields


def _dropout_of_model(model: str) -> dict[str, object]:
    """Return the fields for dropout in the config of a model."""
    config = load_model_config(local_model(model)).get_text_config().to_dict()
    return {name: value for name, value in config.items() if "drop" in name}


def _check_cell(
    file: str, overrides: Mapping[str, str], folder: Path, grid: str | None, models: set[str] | None
) -> FlatConfig:
    """Return the config of a cell, as flat keys. Raises UserError for one that is not valid, at any point of the
    grid; the config without those values need not be, because it never runs."""
    overrides = {**overrides, "run.dir": str(folder)}
    points: dict[str, FinetuneConfig] = {}
    for name, values in read_grid(grid, overrides).items() if grid is not None else ():
        with user_errors_in(f"grid: {name}"):
            points[name] = validate_finetuning(file, {**overrides, **values}, models)
            check_points(name, points)
    config = flatten(load_run_config(file, overrides) if points else validate_finetuning(file, overrides, models))
    if config["training.precision"] == "auto":
        config["training.precision"] = choose_device("auto").precision
    return {**{key: value for key, value in config.items() if not key.startswith(_IRRELEVANT)}, "grid": grid}


def _cell_argv(file: str, overrides: Mapping[str, str], folder: Path, grid: str | None) -> tuple[str, ...]:
    if grid is None:
        return deepcloze_command("finetune", file, {"run.dir": folder, **overrides})
    return deepcloze_command("sweep", file, {"grid": grid, "output": folder, **overrides})
