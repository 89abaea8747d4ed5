"""`deepcloze finetune`: one task, one or more seeds, from config to scores.

1. Read the splits, find the labels, tokenise: what is wrong with the input is said before anything is trained.
2. Per seed: build the model, train it, keep the epoch that was best on validation, predict. A seed's folder appears
   when it is complete; a run that is started again trains only the seeds it lacks.
3. Put the seeds together: results.json, confusion.png, curves.png, a table.
"""

import csv
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable

from experiment.checkpoints import find_model_folder
from experiment.config import dump_config, flatten, load_config
from experiment.errors import UserError
from experiment.files import sha256, write_json, write_text
from experiment.provenance import ancestors_of, collect_provenance, write_provenance
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from experiment.tables import CsvFormat
from experiment.tokenizer import load_any_tokenizer
from experiment.tracking.console import terminal
from experiment.tracking.tracker import Tracker, open_trackers
from finetune.config import FinetuneConfig
from finetune.figures import draw_confusion, draw_curves
from finetune.metrics import confusion_matrix, spread
from finetune.model import Initialisation, build_model, read_architecture, save_model
from finetune.tasks.examples import Examples, make_examples
from finetune.tasks.kinds import KINDS, balanced_weights
from finetune.tasks.rows import Table, read_table
from finetune.training import Device, Epoch, Log, Probabilities, Task, choose_device, fit, score, steps_per_epoch

SPLITS = ("train", "validation", "test")
COMPLETE = "COMPLETE"  # written last into a seed's folder


@dataclass(frozen=True)
class SeedRecord:
    """What a finished seed leaves behind for the run's summary; `seed-…/COMPLETE` holds it."""

    settings: dict[str, Any]  # everything that determines the outcome, but for the seed
    best_epoch: int
    epochs: list[dict[str, float]]
    scores: dict[str, dict[str, float]]  # split -> metric -> value, of the best epoch
    confusion: dict[str, list[list[int]]]  # split -> counts, gold label by predicted label


def finetune(config: str | Path, overrides: Mapping[str, str] | None = None) -> None:
    """The command: `config` is a YAML file, `overrides` maps dotted keys to raw text. Raises UserError."""
    resolved = resolve_paths(load_config(FinetuneConfig, config, overrides), default_name=Path(config).stem)
    results = run(resolved)
    print_results(results, Path(resolved.run.dir))


def resolve_paths(config: FinetuneConfig, default_name: str) -> FinetuneConfig:
    """The config with absolute paths, the Hugging Face folder that init_from stands for, and a task name."""
    files = {split: str(Path(path).absolute()) for split in SPLITS if (path := getattr(config.task, split)) is not None}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute())}),
            "task": config.task.model_copy(update={**files, "name": config.task.name or default_name}),
            "model": config.model.model_copy(update={"init_from": str(_find_model(config.model.init_from))}),
        }
    )


def _find_model(init_from: str) -> Path:
    try:
        return find_model_folder(Path(init_from).absolute())
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Do what a resolved config says; the result is what results.json holds. Raises UserError."""
    device = choose_device(config.training.precision)
    tables, labels = read_splits(config)
    kind = KINDS[config.task.kind]
    start = Initialisation(Path(config.model.init_from), config.model.weights == "pretrained", kind.auto_model, labels)
    _say(f"{config.task.name}: {', '.join(f'{len(table.rows):,} {split}' for split, table in tables.items())}")
    task = make_task(config, start, tables)
    folder = open_run_folder(config.run.dir)
    settings = outcome_settings(config, labels, tables)
    records = finished_seeds(folder, settings)
    for line in describe_data(task, labels):
        _say(f"{config.task.name}: {line}")

    write_text(folder.config, dump_config(config))
    ancestors = ancestors_of(start.folder, "init_from") if start.pretrained else []
    run_id = write_provenance(folder, collect_provenance(sys.argv), ancestors)
    seeds = config.training.seeds
    steps = steps_per_epoch(task, config.training) * config.training.epochs
    done = [seed for seed in seeds if seed in records]
    if done:
        _say(f"already finished in {folder.path}: seed {', '.join(map(str, done))}")
    tracker = open_trackers(
        config.tracking,
        folder,
        total_steps=steps * len(seeds),
        resumed_step=steps * len(done),
        run_id=run_id,
        parameters=flatten(config),
    )
    outcome = Outcome.FAILED
    try:
        for seed in seeds:
            if seed not in records:
                log = _count_from(tracker, steps * len(done))
                records[seed] = run_seed(seed, start, task, config, device, folder, settings, log)
                done.append(seed)
        outcome = Outcome.DONE
    except KeyboardInterrupt:
        outcome = Outcome.STOPPED
        raise
    finally:
        tracker.close(outcome)
    return write_summary(folder, config, labels, {seed: records[seed] for seed in seeds})


def read_splits(config: FinetuneConfig) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The rows of each split, and the labels in the order of their ids. Raises UserError."""
    task = config.task
    columns = {role: column for role, column in task.columns.model_dump().items() if column is not None}
    csv_format = CsvFormat(task.sep, task.quoting, header=task.header == 0, quoting_key="task.quoting:")
    tables = {
        split: read_table(Path(path), columns, csv_format, label_required=split != "test")
        for split in SPLITS
        if (path := getattr(task, split)) is not None
    }
    return tables, tuple(task.labels) if task.labels else KINDS[task.kind].find_labels(tables["train"])


def make_task(config: FinetuneConfig, start: Initialisation, tables: Mapping[str, Table]) -> Task:
    """Tokenise. Raises UserError for an unknown label, or sequences longer than the model's positions."""
    kind = KINDS[config.task.kind]
    tokenizer = load_any_tokenizer(start.folder, needed=("pad_token",))
    architecture = read_architecture(start, tokenizer)
    length = config.model.max_seq_length
    if architecture.max_length is not None and length > architecture.max_length:
        raise UserError(
            f"model.max_seq_length is {length}, the model in {start.folder} has {architecture.max_length} positions"
        )
    splits = {
        split: make_examples(table, kind, start.labels, tokenizer, length, architecture.token_types)
        for split, table in tables.items()
    }
    weights = None
    if config.training.class_weights == "balanced":
        weights = tuple(balanced_weights(splits["train"].targets or (), len(start.labels)))
    return Task(kind, config.task.metric, splits, weights, tokenizer.pad_token_id)


def outcome_settings(config: FinetuneConfig, labels: Sequence[str], tables: Mapping[str, Table]) -> dict[str, Any]:
    """All that determines what a seed ends with: two seeds with the same settings may stand in one table."""
    tree = config.model_dump(mode="json")
    del tree["run"], tree["tracking"], tree["task"]["name"], tree["training"]["seeds"]
    tree["task"]["labels"] = list(labels)
    return {**tree, "sha256": {split: sha256(table.path) for split, table in tables.items()}}


def finished_seeds(folder: RunFolder, settings: Mapping[str, Any]) -> dict[int, SeedRecord]:
    """The seeds that are complete in the run folder.

    Raises UserError where the folder belongs to a pretraining run, or to other settings than these.
    """
    if folder.checkpoints.exists():
        raise UserError(f"run.dir: {folder.path} holds a pretraining run; choose another folder")
    records = {}
    for marker in sorted(folder.path.glob(f"seed-*/{COMPLETE}")):
        try:
            record = SeedRecord(**json.loads(marker.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{marker} is damaged: remove {marker.parent}, and its seed is trained again") from None
        ours, theirs = flatten(settings), flatten(record.settings)
        if different := [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]:
            key = different[0]
            raise UserError(
                f"run.dir: {marker.parent} was trained with other settings: {', '.join(different)} "
                f"({key} was {theirs.get(key)!r}, is {ours.get(key)!r}); choose another run.dir"
            )
        records[int(marker.parent.name.removeprefix("seed-"))] = record
    return records


def run_seed(
    seed: int,
    start: Initialisation,
    task: Task,
    config: FinetuneConfig,
    device: Device,
    folder: RunFolder,
    settings: dict[str, Any],
    log: Log,
) -> SeedRecord:
    """Build, train and keep one model. Its folder RUN/seed-… is written aside and appears when it is whole."""
    torch.manual_seed(seed)  # the head's initialisation; `fit` sets it again for what follows
    model, fresh = build_model(start)
    _say(f"seed {seed}: {describe_model(model, fresh, start, device)}")
    fitted = fit(model, task, config.training, seed, device, log)
    epochs = [_epoch_row(epoch) for epoch in fitted.epochs]
    scored = {split: p for split, p in fitted.probabilities.items() if task.splits[split].targets is not None}
    record = SeedRecord(
        settings=settings,
        best_epoch=fitted.best.epoch,
        epochs=epochs,
        scores={split: score(task, split, probabilities) for split, probabilities in scored.items()},
        confusion={
            split: confusion_matrix(np.array(task.splits[split].targets), p.argmax(axis=1), len(start.labels)).tolist()
            for split, p in scored.items()
        },
    )
    aside = folder.path / f".seed-{seed}"
    final = folder.path / f"seed-{seed}"
    for left_over in (aside, final):
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    tokenizer = load_any_tokenizer(
        start.folder, needed=("pad_token",)
    )  # afresh: tokenising left its settings behind in the other one
    save_model(model, tokenizer, config.model.max_seq_length, aside / "model")
    _write_csv(aside / "epochs.csv", list(epochs[0]), [list(row.values()) for row in epochs])
    for split, probabilities in fitted.probabilities.items():
        write_predictions(aside / f"predictions-{split}.csv", task.splits[split], probabilities, start.labels)
    write_json(aside / COMPLETE, asdict(record))
    aside.rename(final)
    return record


def write_predictions(path: Path, examples: Examples, probabilities: Probabilities, labels: Sequence[str]) -> None:
    """The split's rows in their order: row (from 1), text, text_pair, label, predicted, a probability per label."""
    roles = [role for role in ("text", "text_pair", "label") if role in examples.table.rows[0].values]
    header = ["row", *roles, "predicted", *(f"probability_{label}" for label in labels)]
    rows = [
        [number, *(row.values[role] for role in roles), labels[p.argmax()], *(f"{value:.6f}" for value in p)]
        for number, (row, p) in enumerate(zip(examples.table.rows, probabilities, strict=True), start=1)
    ]
    _write_csv(path, header, rows)


def write_summary(
    folder: RunFolder, config: FinetuneConfig, labels: Sequence[str], records: Mapping[int, SeedRecord]
) -> dict[str, Any]:
    """results.json, confusion.png (all seeds together, on test where it has labels) and curves.png."""
    first = next(iter(records.values()))
    results = {
        "task": config.task.name,
        "kind": config.task.kind,
        "init": config.model.init_from if config.model.weights == "pretrained" else "random",
        "metric": config.task.metric,
        "labels": list(labels),
        "seeds": list(records),
        "best_epochs": [record.best_epoch for record in records.values()],
        "splits": {
            split: {name: spread([record.scores[split][name] for record in records.values()]) for name in metrics}
            for split, metrics in first.scores.items()
        },
    }
    split = list(first.confusion)[-1]
    confusion = np.sum([record.confusion[split] for record in records.values()], axis=0)
    title = f"{config.task.name}, {split}, {len(records)} seed{'s' if len(records) > 1 else ''}"
    draw_confusion(folder.path / "confusion.png", confusion, labels, title)
    curves = {seed: record.epochs for seed, record in records.items()}
    draw_curves(folder.path / "curves.png", curves, config.task.metric)
    write_json(folder.path / "results.json", results)
    return results


def describe_data(task: Task, labels: Sequence[str]) -> list[str]:
    """Lines on what was read: the labels' shares, and what the user may not expect."""
    targets = np.array(task.splits["train"].targets)
    shares = np.bincount(targets, minlength=len(labels)) / len(targets)
    named = ", ".join(f"{label} {share:.1%}" for label, share in zip(labels, shares, strict=True))
    lines = [f"{len(labels)} labels, in train: {named}"]
    for split, examples in task.splits.items():
        if examples.truncated:
            lines.append(f"{split}: {examples.truncated:,} of {len(examples):,} examples are cut at max_seq_length")
        if examples.targets is None:
            lines.append(f"{split}: without labels, so it is predicted but not scored")
        if empty := sum(not all(text.strip() for text in task.kind.texts(row)) for row in examples.table.rows):
            lines.append(f"{split}: {empty:,} rows have an empty text")
    return lines


def describe_model(model: Any, fresh: Sequence[str], start: Initialisation, device: Device) -> str:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    origin = (
        f"from {start.folder}, fresh: {', '.join(fresh) or 'nothing'}" if start.pretrained else "randomly initialised"
    )
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[device.autocast]
    return f"{model.config.model_type}, {size:.1f} M parameters, {origin}; {precision} on {device.device.type}"


def print_results(results: Mapping[str, Any], path: Path) -> None:
    """The table of scores on stdout: mean ± standard deviation over the seeds."""
    splits = results["splits"]
    table = RichTable()
    table.add_column(f"mean ± std of {len(results['seeds'])}")
    for split in splits:
        table.add_column(split, justify="right")
    for name in next(iter(splits.values())):
        cells = [f"{scores[name]['mean']:.4f} ± {scores[name]['std']:.4f}" for scores in splits.values()]
        table.add_row(f"{name} *" if name == results["metric"] else name, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"* decided which epoch was kept\n{path / 'results.json'}", markup=False, soft_wrap=True, highlight=False
    )


def _say(line: str) -> None:
    terminal().print(line, markup=False, emoji=False)


def _count_from(tracker: Tracker, before: int) -> Log:
    """Steps are counted on from one seed to the next, so that the run has one time axis."""
    return lambda step, figures: tracker.log({"step": before + step, **figures})


def _epoch_row(epoch: Epoch) -> dict[str, float]:
    row = asdict(epoch)
    scores = row.pop("scores")
    return {**row, **scores}


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
