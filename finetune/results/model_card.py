"""The model card of a fine-tuned model: RUN/seed-N/model/README.md.

It has no times, so equal runs have equal cards. It is written with the seed; the scores of all seeds are added once,
at the end of the run, and a card is never changed otherwise: a user may have edited it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from experiment.config import flatten
from experiment.files import write_text
from experiment.results.model_card import (
    FILE,
    MODEL,
    UNKNOWN,
    CardBlock,
    ModelCard,
    Score,
    Snippet,
    attempt_row,
    cpu_name,
    escape,
    format_number,
    format_value,
    hardware_blocks,
    lineage_blocks,
    metadata_of,
    model_name,
    render_block,
    render_card,
    settings_table,
)
from experiment.results.page import Heading, Table, Text
from finetune.data.task_config import TaskConfig
from finetune.metrics import summarize
from finetune.resolve import ResolvedRun
from finetune.results.seed_summary import SeedRecord

_SEEDS = "<!-- deepcloze: scores of all seeds -->"
"""A line of the card that the scores of all seeds replace."""

COMMANDS = Snippet(
    "bash",
    """
deepcloze predict --model . --input rows.csv --output predictions.csv
deepcloze serve --model .
""",
)
"""How to use a model folder with deepcloze."""
_LABEL_SCORES = ("precision", "recall", "f1")


def write_seed_card(
    seed: int, run: ResolvedRun, record: SeedRecord, provenance: Mapping[str, Any], folder: Path
) -> None:
    """Write README.md into the model folder of a seed. provenance: of the run."""
    task, ancestors = run.task.kind.config, provenance["ancestors"]
    title = str(task.name)
    scores = [
        Score(metric, value, title, split) for split, found in record.scores.items() for metric, value in found.items()
    ]
    blocks = [
        Text(_introduction(seed, run, ancestors)),
        *_results(run, record),
        *_data(run),
        *_training(seed, run, record),
        *_hardware(run, provenance["attempts"][-1]),
        *lineage_blocks(ancestors),
    ]
    metadata = metadata_of(run.task.kind.hub_task, [task.kind.replace("_", "-")], ancestors, title, scores)
    write_text(folder / FILE, render_card(ModelCard(title, metadata, _usage(run), blocks)))


def add_seed_scores(run: Path, records: Mapping[int, SeedRecord]) -> None:
    """Add the mean over the seeds to the cards that have none yet."""
    if len(records) < 2:
        return
    for seed in records:
        path = run / f"seed-{seed}" / "model" / FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if _SEEDS in text:
            write_text(path, text.replace(f"{_SEEDS}\n", "\n".join(map(render_block, _seed_scores(records))), 1))


def _seed_scores(records: Mapping[int, SeedRecord]) -> list[CardBlock]:
    rows = [
        [split, metric, *_mean_and_deviation([record.scores[split][metric] for record in records.values()])]
        for split, metrics in next(iter(records.values())).scores.items()
        for metric in metrics
    ]
    table = Table(["split", "metric", "mean", "standard deviation"], rows, labels=2)
    return [Text(f"All {len(records)} seeds of the run ({', '.join(map(str, records))}):"), table]


def _mean_and_deviation(values: Sequence[float]) -> list[str]:
    summary: dict[str, Any] = summarize(values)
    return [format_number(summary[key], 4) for key in ("mean", "std")]


def _introduction(seed: int, run: ResolvedRun, ancestors: Sequence[Mapping[str, Any]]) -> str:
    task = run.task.kind.config
    base = escape(model_name(ancestors[-1])) if ancestors else "random weights"
    made = "fine-tuned with deepcloze from" if run.task.is_trained else "scored with deepcloze without training:"
    kind = task.kind.replace("_", " ")
    return f"A model for the task {escape(str(task.name))} ({kind}), {made} {base}, with seed {seed}."


def _usage(run: ResolvedRun) -> list[CardBlock]:
    length = f"max_length={run.max_seq_length}"
    padded = run.task.padding.length is not None
    tokenizing = f"truncation=True, {length}" + (', padding="max_length"' if padded else "")
    code = Template(run.task.kind.usage).substitute(model=MODEL, tokenizing=tokenizing, length=length)
    roles = run.task.kind.config.columns.without_targets().cell_types()
    columns = ", ".join(escape(name) for role in roles for name in run.task.kind.config.columns.names(role))
    commands = f"deepcloze prepares texts as in training. The input of `predict` has the columns {columns}:"
    return [
        Snippet("python", code),
        Text(commands),
        COMMANDS,
    ]


def _results(run: ResolvedRun, record: SeedRecord) -> Iterator[CardBlock]:
    yield Heading("Results")
    rows = [
        [split, metric, format_number(value, 4), _interval(record.intervals.get(split, {}).get(metric))]
        for split, metrics in record.scores.items()
        for metric, value in metrics.items()
    ]
    yield Table(["split", "metric", "this model", "95 % interval"], rows, labels=2)
    if "validation" in record.scores and run.task.is_trained:
        chosen = f"The weights were chosen by {escape(run.task.metric)} on validation"
        yield Text(f"{chosen}, so the scores on validation are optimistic.")
    yield Text(_SEEDS)
    if record.collapsed:
        splits = ", ".join(map(escape, record.collapsed))
        yield Text(f"**This model has collapsed**: it predicts the same for every row of {splits}.")
    for split, labels in list(record.label_scores.items())[-1:]:
        label_rows = [
            [label, *(format_number(scores[key], 4) for key in _LABEL_SCORES), format_number(scores["support"])]
            for label, scores in labels.items()
        ]
        yield Table(["label", *_LABEL_SCORES, "support"], label_rows, f"Labels on {escape(split)}:")
    if record.temperature is not None:
        yield _calibration(record, record.temperature)


def _interval(interval: Sequence[float] | None) -> str:
    return UNKNOWN if interval is None else " to ".join(format_number(end, 4) for end in interval)


def _calibration(record: SeedRecord, temperature: float) -> Table:
    rows = [
        [split, *(format_number(errors[key], 4) for key in ("ece", "calibrated_ece"))]
        for split, errors in record.calibration.items()
    ]
    caption = f"Expected calibration error, and with logits divided by the temperature {temperature:.4g}:"
    return Table(["split", "as it is", "calibrated"], rows, caption)


def _data(run: ResolvedRun) -> list[CardBlock]:
    task, tables = run.task.kind.config, {split: found.table for split, found in run.task.splits.items()}
    rows = [
        [split, table.path.name, format_number(len(table)), table.digest, "yes" if table.labelled else "no"]
        for split, table in tables.items()
    ]
    drawn = "validation" in tables and task.validation is None
    notes = "Fingerprint: of the values in the columns below."
    notes += f" Validation is drawn from train with seed {task.split_seed}." if drawn else ""
    columns = {role: list(task.columns.names(role)) for role in task.columns.cell_types()}
    return [
        Heading("Data"),
        Table(["split", "file", "rows", "fingerprint", "labelled"], rows, labels=2),
        Text(notes),
        Table(["role", "columns"], [[role, format_value(names)] for role, names in columns.items()], labels=2),
    ]


def _training(seed: int, run: ResolvedRun, record: SeedRecord) -> list[CardBlock]:
    settings = run.settings
    own_keys = type(run.task.kind.config).model_fields.keys() - TaskConfig.model_fields.keys()
    task = {key: settings["task"][key] for key in ("dialogue", "special_tokens_in_text", *sorted(own_keys))}
    model = {key: settings["model"][key] for key in ("weights", "max_seq_length", "freeze")}
    last, best = (record.epochs[-1] if record.epochs else {}), _best(record)
    facts = {
        "labels": list(run.task.kind.labels),
        "seed": seed,
        "steps": last.get("steps"),
        "epoch of these weights": best.get("epoch"),
        "step of these weights": best.get("steps"),
    }
    training = settings["training"] if run.task.is_trained else {"precision": settings["training"]["precision"]}
    return [Heading("Training"), settings_table(facts | flatten({"task": task, "model": model, "training": training}))]


def _best(record: SeedRecord) -> Mapping[str, float]:
    return next((row for row in record.epochs if row["epoch"] == record.best_epoch), {})


def _hardware(run: ResolvedRun, attempt: Mapping[str, Any]) -> list[CardBlock]:
    hardware = attempt["hardware"]
    device = hardware["gpus"][0] if run.device.device.type == "cuda" else cpu_name(hardware)
    return hardware_blocks([attempt_row(attempt, device)])
