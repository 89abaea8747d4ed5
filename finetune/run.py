"""`deepcloze finetune`: from a config to the scores of one task with one or more seeds.

1. Read the splits, find the labels, tokenize, inspect the model: bad input is rejected before anything is trained.
2. For each seed: build the model, train it, keep the weights that are best on validation, predict. A seed's folder
   appears when it is complete; a restarted run trains only the missing seeds, and resumes one that was interrupted.
3. Combine the seeds: results.json, confusion.png, curves.png, a table.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiment.allocator import keep_freed_memory
from experiment.checkpoints import find_model_folder
from experiment.config import dump_config, flatten, load_config
from experiment.disk_errors import stopped_by_disk_errors
from experiment.errors import StoppedError, UserError
from experiment.files import write_text
from experiment.outcome_file import Outcome
from experiment.provenance import ancestors_of, collect_provenance, write_provenance
from experiment.run_folder import RunFolder, check_creatable, check_run_folder, open_run_folder
from experiment.run_lock import check_unlocked, lock_run
from experiment.tracking.console import terminal
from experiment.tracking.tracker import TrackedRun, Tracker, check_tracking, open_trackers
from finetune.config import FinetuneConfig, ModelConfig, TrainingConfig
from finetune.data_report import data_warnings, print_lengths
from finetune.device import choose_device
from finetune.inference import adapt_to_model
from finetune.model import ModelSpec, build_model, describe_model
from finetune.results.model_card import add_seed_scores
from finetune.results.seed_summary import write_results
from finetune.results.tables import print_results
from finetune.seed_record import SeedRecord, Setup
from finetune.seed_run import finished_seeds, result_settings, state_file, train_seed
from finetune.splits import Task, describe_task, make_kind, make_task, read_splits
from finetune.task_kind import TaskKind
from finetune.training.fit import Log
from finetune.training.updater import total_steps

_RESUME = "; the same command resumes"


def finetune(config: str | Path, overrides: Mapping[str, str] | None = None, dry_run: bool = False) -> None:
    """Run the command. config: a YAML file; overrides: dotted keys to raw text. Raises UserError.

    dry_run: print what would be done.
    """
    resolved = resolve_paths(load_config(FinetuneConfig, config, overrides), default_name=Path(config).stem)
    if dry_run:
        print(f"# config\n{dump_config(resolved)}")
        setup = prepare(resolved)
        print(_describe_training(setup.task, resolved.training))
    else:
        folder = Path(resolved.run.dir)
        print_results(run(resolved), folder / "results.json")
        if any(folder.glob("seed-*/model")):
            model = shlex.quote(str(folder))
            _print(
                f"next: deepcloze predict --model {model} --input FILE --output FILE; deepcloze serve --model {model}"
            )


def check(config: str | Path, overrides: Mapping[str, str] | None = None) -> None:
    """Raise UserError for what would keep `finetune` from training. Prints what is notable about the data."""
    prepare(resolve_paths(load_config(FinetuneConfig, config, overrides), default_name=Path(config).stem))


def resolve_paths(config: FinetuneConfig, default_name: str) -> FinetuneConfig:
    """The config with absolute paths, the Hugging Face folder that init_from refers to, and a task name.

    Raises UserError if init_from refers to no usable model.
    """
    files = {split: str(Path(path).absolute()) for split, path in config.task.files().items()}
    splits = {split: files.pop(split, None) for split in ("train", "validation")}
    tests = files if isinstance(config.task.test, Mapping) else files.get("test")
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute())}),
            "task": config.task.model_copy(update={**splits, "test": tests, "name": config.task.name or default_name}),
            "model": config.model.model_copy(update={"init_from": str(_find_model(config.model.init_from))}),
        }
    )


def _find_model(init_from: str) -> Path:
    try:
        return find_model_folder(Path(init_from)).absolute()
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Train and score what a resolved config describes. Returns the content of results.json.

    Raises UserError, also if the disk refuses something, and StoppedError if it is full after training has begun.
    """
    _prepare_process()
    folder = RunFolder(Path(config.run.dir))
    dead = check_unlocked(folder)  # before the data is read, which may take minutes
    check_creatable(folder)
    setup = prepare(config)
    open_run_folder(setup.folder.path)
    with lock_run(setup.folder, dead=dead):
        return _train_and_score(setup)


def _prepare_process() -> None:
    keep_freed_memory()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns without a choice


def prepare(config: FinetuneConfig) -> Setup:
    """Read the data and inspect the model, and print what is found. Writes nothing. Raises UserError."""
    name = config.task.name
    check_run_folder(RunFolder(Path(config.run.dir)), "fine-tuning run")
    check_tracking(config.tracking)
    device = choose_device(config.training.precision)
    tables = read_splits(config.task, Path(config.model.init_from), config.training.fit_on)
    kind = make_kind(config.task, tables)
    model = _model_spec(config.model, kind)
    _print(f"{name}: {', '.join(f'{len(table):,} {split}' for split, table in tables.items())}")
    for line in data_warnings(tables, config.task.columns):
        _print(f"{name}: {line}")
    task = make_task(config, kind, model, tables)
    built = build_model(model)
    if model.pretrained and built.new and not task.is_trained:
        raise UserError(f"{model.folder}: its weights lack {', '.join(built.new[:3])}, and the task is not trained")
    task, device, changes = adapt_to_model(built.model, task, device, config.model.max_seq_length)
    for line in [*describe_task(task), *describe_model(built, model), *changes]:
        _print(f"{name}: {line}")
    print_lengths(terminal(), task.splits, task.positions)
    settings = result_settings(config, model, device, kind.labels, tables)
    return Setup(config, model, task, device, RunFolder(Path(config.run.dir)), settings)


def check_data(config: FinetuneConfig) -> None:
    """Read and encode the splits of a resolved config, which shows mistakes in the data. Raises UserError."""
    tables = read_splits(config.task, Path(config.model.init_from), config.training.fit_on)
    kind = make_kind(config.task, tables)
    make_task(config, kind, _model_spec(config.model, kind), tables)


def _model_spec(config: ModelConfig, kind: TaskKind[Any]) -> ModelSpec:
    return ModelSpec(
        folder=Path(config.init_from),
        pretrained=config.weights == "pretrained",
        auto_model=kind.auto_model,
        head=kind.head,
        freeze=config.freeze,
    )


def _train_and_score(setup: Setup) -> dict[str, Any]:
    config, folder, model = setup.config, setup.folder, setup.model
    finished = finished_seeds(folder, setup.settings)
    write_text(folder.config, dump_config(config))
    ancestors = ancestors_of(model.folder, "init_from") if model.pretrained else []
    run_id = write_provenance(folder, collect_provenance(sys.argv), ancestors)
    records = _train_missing_seeds(setup, finished, run_id)
    with stopped_by_disk_errors(advice=_RESUME):
        add_seed_scores(folder.path, records)
        return write_results(folder, config, setup.task.kind.labels, records)


def _train_missing_seeds(setup: Setup, finished: Mapping[int, SeedRecord], run_id: str) -> dict[int, SeedRecord]:
    """The records of all seeds of the config, in its order."""
    config = setup.config
    seeds = config.training.seeds
    records = {seed: finished[seed] for seed in seeds if seed in finished}
    for line in _describe_finished(list(records), setup):
        _print(line)
    missing = [seed for seed in seeds if seed not in records]
    started = state_file(missing[0], setup).steps if missing else 0
    if started:
        _print(f"seed {missing[0]}: resuming after step {started:,}")
    steps = total_steps(setup.task, config.training)
    tracked = TrackedRun(
        run_id=run_id,
        parameters=flatten(config),
        total_steps=steps * len(seeds),
        resumed_step=steps * len(records) + started,
    )
    tracker = open_trackers(config.tracking, setup.folder, tracked)
    outcome = Outcome.FAILED
    try:
        with stopped_by_disk_errors(advice=_RESUME):
            for seed in missing:
                records[seed] = train_seed(seed, setup, _log_from_step(tracker, steps * len(records)))
        outcome = Outcome.DONE
    except (KeyboardInterrupt, StoppedError):
        outcome = Outcome.STOPPED
        raise
    finally:
        tracker.close(outcome)
    return {seed: records[seed] for seed in seeds}


def _describe_finished(seeds: Sequence[int], setup: Setup) -> list[str]:
    """Lines on the seeds that are not trained again."""
    folder = setup.folder.path
    lines = [f"already finished in {folder}: seed {', '.join(map(str, seeds))}"] if seeds else []
    folders = [f"seed-{seed}" for seed in seeds if not (folder / f"seed-{seed}" / "model").exists()]
    if folders and setup.config.run.keep == "best":
        lines.append(f"finished without a model: {', '.join(folders)}; remove these folders to train and keep one")
    return lines


def _describe_training(task: Task, training: TrainingConfig) -> str:
    if not task.is_trained:
        return "nothing is trained: the splits are only scored"
    updates = total_steps(task, training)
    return f"{updates:,} updates of {training.batch_size} examples for each of {len(training.seeds)} seeds"


def _log_from_step(tracker: Tracker, first: int) -> Log:
    """Logs a seed's steps counted from `first`, so that the seeds of a run share one time axis."""
    return lambda step, figures: tracker.log({"step": first + step, **figures})


def _print(line: str) -> None:
    terminal().print(line, markup=False, emoji=False)
