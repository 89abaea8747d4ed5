"""Resolve a run: config -> everything that is known before it trains.

`resolve` reads the data, finds the labels, tokenizes and inspects the model: bad input is rejected before anything is
trained. The code below takes the typed result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiment.config import flatten, load_config, read_recorded
from experiment.errors import UserError, user_errors_in
from experiment.files import checksum
from experiment.formatting import counted
from experiment.models.model_names import local_model, mention_state, record_model
from experiment.progress import print_warning, terminal
from experiment.run_files.checkpoints import find_model_folder
from experiment.run_files.run_folder import RunFolder, check_not_moved, check_run_folder
from experiment.tracking.tracker import check_tracking
from finetune.config import CHANGE_ROUNDING_ONLY, FinetuneConfig, TrainingConfig
from finetune.data.records import Table
from finetune.data.splits import read_splits
from finetune.data.task_config import TaskConfig
from finetune.data_report import data_warnings, describe_example, print_lengths, unknown_warnings
from finetune.device import Device, choose_device
from finetune.encoding.encoder import turn_joiner
from finetune.evaluation_texts import contamination_warnings
from finetune.model import (
    BuiltModel,
    ModelSpec,
    build_model,
    check_config_fields,
    describe_model,
    model_files,
    pooling_of_head,
)
from finetune.model_trial import adapt_to_model
from finetune.prepared_task import PreparedTask, describe_task, load_inputs, make_kind, make_task
from finetune.task_kind import TaskKind, find_kind
from finetune.training.updater import total_steps

_FEW_ROWS = 50  # whose accuracy has a standard error of up to 7 points

OF_DATA_AND_MODEL = ("data.", "encoder.", "task.", "model.", "training.precision")
"""Prefixes of the settings of a seed that `resolve` completes, or in which it finds mistakes."""


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that the seeds of a run share."""

    folder: RunFolder
    keep: Literal["best", "all", "none"]  # models to save
    model: ModelSpec
    max_seq_length: int  # tokens of a sequence, special tokens included
    task: PreparedTask
    training: TrainingConfig
    steps: int  # updates of each seed; 0 if nothing is trained
    settings: dict[str, Any]  # everything the results of a seed depend on, apart from the seed


def load_run_config(file: str | Path, overrides: Mapping[str, str] | None = None) -> FinetuneConfig:
    """Return the config of a file with absolute paths, the model that init_from refers to, and a task name.

    overrides: dotted keys to raw text. Raises UserError, also if init_from refers to no usable model, and for the
    config.yaml of a run that was moved.
    """
    config = load_config(FinetuneConfig, file, overrides)
    folder = RunFolder(Path(config.run.dir).absolute())
    check_not_moved(file, overrides or (), folder)
    earlier = flatten(read_recorded(folder.config))  # with the commits of models and data of the Hub
    task = config.task.pinned(map(str, earlier.values()))
    began = earlier.get("model.init_from")
    with user_errors_in("model.init_from"):
        model = record_model(config.model.init_from, began)
        if model != began:
            mention_state(config.model.init_from, model)
    with user_errors_in("model.init_from, which this run has recorded" if model == began else "model.init_from"):
        folder_of_model = local_model(model)  # copies a model of the Hub to this machine
        if model == began:  # otherwise `record_model` has found it
            find_model_folder(folder_of_model)
    task = task.for_model(model, earlier if model == began else {})
    seeds = config.training.seeds
    if not task.is_trained and config.model.weights == "pretrained":  # nothing depends on the seed
        seeds = seeds[:1]
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(folder.path)}),
            "task": task.model_copy(update={"name": task.name or Path(file).stem}),
            "model": config.model.model_copy(update={"init_from": model}),
            "training": config.training.model_copy(update={"seeds": seeds}),
        }
    )


def resolve(config: FinetuneConfig, uses_head: bool = True) -> ResolvedRun:
    """Read the data and inspect the model, and print the findings. Writes nothing. Raises UserError.

    config: as `load_run_config` returns it. uses_head: False for a probe.
    """
    name, training, length = config.task.name, config.training, config.model.max_seq_length
    folder = RunFolder(Path(config.run.dir))
    check_run_folder(folder, "fine-tuning run")
    check_tracking(config.tracking)
    device = choose_device(training.precision)
    tables, kind, model = _read_data(config)
    rows = ", ".join(f"{len(table):,} {split}" for split, table in tables.items())
    terminal().print(f"{name}: {rows}")
    for warning in (
        *data_warnings(tables, kind),
        *_split_warnings(tables, config.task),
        *(contamination_warnings(config.task, model.folder) if model.pretrained else ()),
    ):
        print_warning(f"{name}: {warning}")
    task, encoder = make_task(kind, tables, model, length, training, device)
    steps, tokenizer = total_steps(task, training), encoder.tokenizer
    built = _build(model, kind)
    task, changes = adapt_to_model(built.model, task, kind.probe(encoder), length)
    for line in (*describe_task(kind, tables), *describe_model(built, model, uses_head), *changes):
        terminal().print(f"{name}: {line}")
    if model.pretrained and length > (limit := tokenizer.model_max_length):
        print_warning(
            f"{name}: model.max_seq_length is {length}, but the tokenizer in {model.folder} cuts texts at {limit} "
            "tokens: the model may not have been trained on longer ones"
        )
    for warning in (*training.warnings(steps), *unknown_warnings(task.splits, tokenizer.unk_token_id)):
        print_warning(f"{name}: {warning}")
    if "train" in task.splits:
        terminal().print(f"{name}: {describe_example(task.splits['train'], tokenizer, kind.labels)}")
    print_lengths(terminal(), task.splits, task.positions)
    return ResolvedRun(
        folder=folder,
        keep=config.run.keep,
        model=model,
        max_seq_length=length,
        task=task,
        training=training,
        steps=steps,
        settings=_result_settings(config, model, task.device, kind.labels, tables),
    )


def _split_warnings(tables: Mapping[str, Table], config: TaskConfig) -> Iterator[str]:
    """Warn of a validation split that was drawn from the training split, and is too small to choose an epoch by."""
    if config.validation is None and "validation" in tables and (rows := len(tables["validation"])) < _FEW_ROWS:
        yield (
            f"validation: only {counted(rows, 'row')} of train, so that chance decides which epoch is best; set "
            "task.validation, or train on all rows with training.fit_on: train+validation"
        )


def check_data(config: FinetuneConfig) -> None:
    """Read and encode the splits of a config, which shows mistakes in the data. Raises UserError, also if no split can
    be scored."""
    tables, kind, model = _read_data(config)
    if not any(table.labelled for split, table in tables.items() if split != "train"):
        raise UserError("nothing to score: expected a validation split, or a test split with labels")
    make_task(kind, tables, model, config.model.max_seq_length, config.training)


def check_model(config: FinetuneConfig, models: set[str] | None) -> Device:
    """Check what a config needs beside its data, and return the device. Raises UserError.

    models: those that the command has loaded already; this one is added. None: the model does not exist yet.
    """
    check_tracking(config.tracking)
    device = choose_device(config.training.precision)
    kind = find_kind(config.task.kind)(config.task, config.task.labels or ())
    key = repr((config.model, kind.auto_model, config.task.dialogue, config.task.is_trained))
    if models is not None and key not in models:
        model = _model_of(config, kind)
        load_inputs(config.task, model, config.model.max_seq_length)
        if model.pretrained:
            _build(model, kind)
        models.add(key)
    return device


def _read_data(config: FinetuneConfig) -> tuple[Mapping[str, Table], TaskKind[Any], ModelSpec]:
    """Return the rows of each split, the kind of the task with its labels, and the model with a head for them."""
    joiner = turn_joiner(local_model(config.model.init_from), config.task)
    tables = read_splits(config.task, joiner, config.training.fit_on)
    kind = make_kind(config.task, tables)
    return tables, kind, _model_of(config, kind)


def _model_of(config: FinetuneConfig, kind: TaskKind[Any]) -> ModelSpec:
    folder, pretrained = local_model(config.model.init_from), config.model.weights == "pretrained"
    head = {**kind.head, **pooling_of_head(folder, kind.auto_model, config.model.pooling)}
    model = ModelSpec(folder, pretrained, kind.auto_model, head, config.model.freeze, config.model.config)
    check_config_fields(model)
    return model


def _build(model: ModelSpec, kind: TaskKind[Any]) -> BuiltModel:
    built = build_model(model)
    if model.pretrained and built.new and not kind.config.is_trained:
        raise UserError(f"{model.folder}: its weights lack {', '.join(built.new[:3])}, and the task is not trained")
    return built


def config_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the keys of a config that the results of a seed depend on."""
    tree = config.model_dump(mode="json")
    del tree["run"], tree["tracking"], tree["task"]["name"], tree["training"]["seeds"]
    for key in CHANGE_ROUNDING_ONLY:
        del tree["training"][key]
    return tree


def _result_settings(
    config: FinetuneConfig, model: ModelSpec, device: Device, labels: Sequence[str], tables: Mapping[str, Table]
) -> dict[str, Any]:
    """Return everything the results of a seed depend on, apart from the seed: only equal settings may share a table."""
    tree = config_settings(config)
    tree["task"]["labels"] = list(labels)
    tree["training"]["precision"] = device.precision
    files = {path.name: checksum(path) for path in model_files(model.folder, weights=model.pretrained)}
    return {**tree, "encoder": files, "data": {split: table.digest for split, table in tables.items()}}
