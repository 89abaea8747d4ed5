"""The sections of a report about tasks: of a fine-tuning run, and of checkpoints that `deepcloze watch` has scored."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from experiment.csv_and_jsonl import MAX_FIELD
from experiment.errors import UserError
from experiment.files import read_json
from experiment.formatting import UNKNOWN, shorten, show
from experiment.results.charts import Line, Panel, Plot, charts_block
from experiment.results.curves import Curve
from experiment.results.history import Axis
from experiment.results.main_score import main_score
from experiment.results.page import Block, ConfusionMatrix, Heading, Table, Text
from experiment.run_files.downstream import DownstreamResult, best_result, read_results
from experiment.run_files.run_folder import RunFolder

_LABEL_SCORES = ("precision", "recall", "f1")
_WORST = 10  # rows shown
_LONGEST_CELL = 300  # characters
_MATRIX_LABELS = 200  # of a confusion matrix, which has a cell for each pair of them
_PROBABILITIES = "probability_"  # columns that are left out: one for each label


def read_task_results(folder: RunFolder) -> dict[str, Any] | None:
    """RUN/results.json; None if there is none. Raises UserError for a damaged file."""
    path = folder.results
    try:
        results = dict(read_json(path))
        _score_blocks(results)
        main_score(results)
        if not isinstance(results.get("labels", []), list):
            raise TypeError
        return results
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'task', 'init' and 'splits' with scores") from None


def result_blocks(folder: RunFolder, results: Mapping[str, Any]) -> list[Block]:
    """Scores and mistakes of a fine-tuning run. results: of `read_task_results`."""
    blocks = [Heading(f"Task: {results['task']} ({folder.path.name})"), *_score_blocks(results)]
    return [*blocks, *confusion_matrix(folder, results), *worst_rows(folder, list(results["splits"]))]


def _score_blocks(results: Mapping[str, Any]) -> list[Block]:
    return [Text(_subject(results)), _score_table(results), *_label_tables(results)]


def _subject(results: Mapping[str, Any]) -> str:
    subject = f"{results['task']}, from {results['init']}"
    if collapsed := results.get("collapsed"):
        subject += (
            f"; collapsed seeds, which predict the same for every row of a split: {', '.join(map(str, collapsed))}"
        )
    return subject


def _score_table(results: Mapping[str, Any]) -> Table:
    """Return a row for each metric and split, and the calibration errors; with intervals if any metric has one."""
    calibration = results.get("calibration", {})
    found = [
        (split, metric, scores)
        for split, metrics in results["splits"].items()
        for metric, scores in {**metrics, **calibration.get(split, {})}.items()
    ]
    columns = ["split", "metric", "mean", "std", "median", "per seed"]
    rows = [
        [split, metric, *(show(scores[key], ".4f") for key in columns[2:5]), _joined(scores["values"])]
        for split, metric, scores in found
    ]
    if any("interval" in scores for *_, scores in found):
        columns.insert(3, "95 % interval")
        for row, (*_, scores) in zip(rows, found, strict=True):
            row.insert(3, _joined(scores["interval"], " to ") if "interval" in scores else UNKNOWN)
    return Table(columns, rows, labels=2)


def _joined(values: Sequence[float], separator: str = ", ") -> str:
    return separator.join(f"{value:.4f}" for value in values)


def _label_tables(results: Mapping[str, Any]) -> list[Block]:
    """Return the scores of each label and the most frequent mistakes on the last split that has them."""
    blocks: list[Block] = []
    for split, labels in list(results.get("label_scores", {}).items())[-1:]:
        rows = [
            [label, *(show(scores[key]["mean"], ".4f") for key in _LABEL_SCORES), f"{scores['support']:,}"]
            for label, scores in labels.items()
        ]
        blocks.append(Table(["label", *_LABEL_SCORES, "support"], rows, f"Labels on {split}, mean over the seeds"))
        mistakes = [
            [found["label"], found["predicted"], f"{found['count']:,}", f"{found['share']:.1%}"]
            for found in results["confusions"].get(split, ())
        ]
        if mistakes:
            caption = f"Most frequent mistakes on {split}, all seeds together"
            blocks.append(Table(["label", "predicted", "count", "share of the label"], mistakes, caption, labels=2))
    return blocks


def confusion_matrix(folder: RunFolder, results: Mapping[str, Any]) -> list[ConfusionMatrix]:
    """Return the matrix of all seeds together on the last split with one; empty if there is none, as for regression,
    and for very many labels."""
    if len(results.get("labels", ())) > _MATRIX_LABELS:
        return []
    try:
        records = [read_json(folder.seed_folder(seed) / "COMPLETE") for seed in results["seeds"]]
        split = list(records[0]["confusion"])[-1]
        counts: list[list[int]] = np.array([record["confusion"][split] for record in records]).sum(axis=0).tolist()
    except (OSError, ValueError, LookupError, TypeError):  # the folder is being copied
        return []
    return [ConfusionMatrix(results["labels"], counts, f"Confusion matrix on {split}, all seeds together")]


def worst_rows(folder: RunFolder, splits: Sequence[str]) -> Iterator[Table]:
    """Yield the rows with the highest loss of the first seed, on the last split that has them."""
    seeds = sorted(folder.path.glob("seed-*"), key=lambda path: (len(path.name), path.name))  # by number
    files = [path for split in reversed(splits) for seed in seeds if (path := seed / f"worst-{split}.csv").is_file()]
    for path in files[:1]:
        rows = _read_table(path)[:_WORST]
        columns = [name for name in rows[0] if not name.startswith(_PROBABILITIES)] if rows else []
        if columns:
            caption = f"Highest losses on {path.stem.removeprefix('worst-')}, {path.parent.name}"
            cells = [[shorten(row[name] or "", _LONGEST_CELL) for name in columns] for row in rows]
            yield Table(columns, cells, caption, labels=len(columns))


def _read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file of ours; empty if it cannot be read."""
    csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row]
    except (OSError, ValueError, csv.Error):  # it is being copied
        return []


def downstream_blocks(folder: RunFolder, axis: Axis) -> list[Block]:
    """Return the scores of the run's checkpoints on tasks, by step, see `deepcloze watch`; empty without any. axis: of
    the run."""
    if not (results := read_results(folder)):
        return []
    by_task = {task: list(group) for task, group in groupby(results, key=lambda result: result.task)}
    panels = []
    for metric in dict.fromkeys(result.metric for result in results):
        lines = [
            Line(task, Curve.of([result.step for result in group], [result.value for result in group]), marked=True)
            for task, group in by_task.items()
            if group[-1].metric == metric
        ]
        panels.append(Panel(metric, lines, title=metric))
    rows = [_downstream_row(task, group) for task, group in by_task.items()]
    table = Table(["task", "metric", "last", "at step", "best", "at step"], rows, labels=2)
    return [Heading("Downstream tasks"), *charts_block([Plot("downstream", panels)], [axis]), table]


def _downstream_row(task: str, results: Sequence[DownstreamResult]) -> list[str]:
    last, best = results[-1], best_result(results)
    return [task, last.metric, f"{last.value:.4f}", f"{last.step:,}", f"{best.value:.4f}", f"{best.step:,}"]
