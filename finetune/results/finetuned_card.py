"""The model card of a fine-tuned model: RUN/seed-N/model/README.md.

It has no times, so equal runs have equal cards. It is written with the seed; the scores of all seeds are added once,
at the end of the run, and a card is never changed otherwise: a user may have edited it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from experiment.config import flatten
from experiment.files import write_text
from experiment.formatting import UNKNOWN, escape_markdown, markdown_table, show
from experiment.hub_data import public_data_name
from experiment.results.model_card import (
    CARD_FILE,
    MODEL,
    attempt_row,
    format_value,
    front_matter,
    model_name,
    render_card,
    snippet,
    usage_section,
)
from experiment.run_files.provenance import describe_cpu
from experiment.run_files.run_folder import RunFolder
from finetune.data.task_config import TaskConfig
from finetune.resolve import ResolvedRun
from finetune.results.seed_summary import SeedRecord

_SEEDS = "<!-- deepcloze: scores of all seeds -->"
"""A line of the card that the scores of all seeds replace."""

COMMANDS = snippet(
    "bash",
    """
deepcloze predict --model . --input rows.csv --output predictions.csv
deepcloze serve --model .
""",
)
"""Usage of a model folder with deepcloze."""
_LABEL_SCORES = ("precision", "recall", "f1")


def write_seed_card(
    seed: int, run: ResolvedRun, record: SeedRecord, provenance: Mapping[str, Any], folder: Path
) -> None:
    """Write README.md into the model folder of a seed. provenance: of the run."""
    kind, task = run.task.kind, run.task.kind.config
    ancestors, attempt = provenance["ancestors"], provenance["attempts"][-1]
    title, hardware = str(task.name), attempt["hardware"]
    scores = [(title, split, *score) for split, found in record.scores.items() for score in found.items()]
    device = hardware["gpus"][0] if run.task.device.torch_device.type == "cuda" else describe_cpu(hardware)
    tables = {name: split.table for name, split in run.task.splits.items()}
    names = {split: public_data_name(str(table.path)) for split, table in tables.items()}
    if run.training.fit_on == "train+validation":
        names["train"] = " + ".join(
            public_data_name(path) for path in (task.train, task.validation) if path is not None
        )
    text = render_card(
        Path(__file__).with_suffix(".md.j2"),
        title,
        _usage(run),
        ancestors,
        data=front_matter(kind.hub_task, [task.kind.replace("_", "-")], ancestors, title, scores, kind.library),
        hardware=[attempt_row(attempt, device)],
        seed=seed,
        task=task,
        metric=task.metric,
        trained=task.is_trained,
        base=model_name(ancestors[-1]) if ancestors else "random weights",
        record=record,
        seeds_slot=_SEEDS,
        scores=[
            [split, metric, f"{value:,.4f}", _interval(record.intervals[split].get(metric))]
            for split, metrics in record.scores.items()
            for metric, value in metrics.items()
        ],
        label_scores=_label_rows(record),
        calibration=[
            [split, *(show(errors[key], ",.4f") for key in ("ece", "calibrated_ece"))]
            for split, errors in record.calibration.items()
        ],
        files=[
            [split, names[split], f"{len(table):,}", run.settings["data"][split], "yes" if table.labelled else "no"]
            for split, table in tables.items()
        ],
        drawn="validation" in tables and task.validation is None,
        columns=[[role, format_value(list(task.columns.names(role)))] for role in task.columns.cell_types()],
        training=_training(seed, run, record),
    )
    write_text(folder / CARD_FILE, text)


def add_seed_scores(run: RunFolder, results: Mapping[str, Any]) -> None:
    """Add the mean over the seeds to the cards that have none yet. results: the content of results.json."""
    if len(results["seeds"]) < 2:
        return
    for seed in results["seeds"]:
        path = run.seed_folder(seed) / "model" / CARD_FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if _SEEDS in text:
            write_text(path, text.replace(f"{_SEEDS}\n", _seed_scores(results), 1))


def _seed_scores(results: Mapping[str, Any]) -> str:
    rows = [
        [escape_markdown(split), escape_markdown(metric), show(scores["mean"], ",.4f"), show(scores["std"], ",.4f")]
        for split, metrics in results["splits"].items()
        for metric, scores in metrics.items()
    ]
    table = markdown_table(["split", "metric", "mean", "standard deviation"], rows, labels=2)
    return f"All {len(results['seeds'])} seeds of the run ({', '.join(map(str, results['seeds']))}):\n\n{table}"


def _usage(run: ResolvedRun) -> str:
    length, padded = run.max_seq_length, run.task.padding.length is not None
    tokenizing = f"truncation=True, max_length={length}" + (', padding="max_length"' if padded else "")
    values = {"model": MODEL, "tokenizing": tokenizing, "length": length, "overlap": length // 3}
    code = Template(run.task.kind.usage).substitute(values)
    task = run.task.kind.config
    sections = [task.columns.without_targets(), *([] if task.dialogue is None else [task.dialogue])]
    names = (name for section in sections for role in section.cell_types() for name in section.names(role))
    columns = ", ".join(map(escape_markdown, names))
    commands = f"deepcloze prepares texts as in training. The input of `predict` has the columns {columns}:"
    return usage_section(snippet("python", code), commands, COMMANDS)


def _interval(interval: Sequence[float] | None) -> str:
    return UNKNOWN if interval is None else " to ".join(f"{end:,.4f}" for end in interval)


def _label_rows(record: SeedRecord) -> list[tuple[str, list[list[str]]]]:
    """Return the last split that has scores of labels, and their rows; empty without any."""
    found = []
    for split, labels in list(record.label_scores.items())[-1:]:
        rows = [
            [label, *(show(scores[key], ",.4f") for key in _LABEL_SCORES), show(scores["support"], ",")]
            for label, scores in labels.items()
        ]
        found.append((split, rows))
    return found


def _training(seed: int, run: ResolvedRun, record: SeedRecord) -> dict[str, Any]:
    config, settings = run.task.kind.config, run.settings
    own_keys = type(config).model_fields.keys() - TaskConfig.model_fields.keys()
    task = {key: settings["task"][key] for key in ("dialogue", "special_tokens_in_text", *sorted(own_keys))}
    model = {key: settings["model"][key] for key in ("weights", "pooling", "max_seq_length", "config", "freeze")}
    last = record.epochs[-1] if record.epochs else {}
    best: Mapping[str, float] = next((row for row in record.epochs if row["epoch"] == record.best_epoch), {})
    facts = {
        "labels": list(run.task.kind.labels),
        "seed": seed,
        "steps": last.get("steps"),
        "epoch of these weights": best.get("epoch"),
        "step of these weights": best.get("steps"),
    }
    training = dict(settings["training"]) if config.is_trained else {"precision": settings["training"]["precision"]}
    for key, instead in (("epochs", "steps"), ("warmup_ratio", "warmup_steps")):
        if training.get(instead) is not None:
            del training[key]
    return facts | flatten({"task": task, "model": model, "training": training})
