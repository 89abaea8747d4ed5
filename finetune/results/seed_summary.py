"""The results of one seed, and of all seeds together: results.json, confusion.png and curves.png."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.files import write_json
from experiment.formatting import counted
from finetune.resolve import ResolvedRun
from finetune.scores.metrics import LabelScores, Number, summarize, top_confusions


@dataclass(frozen=True)
class SeedRecord:
    """The results of a finished seed, stored in `seed-N/COMPLETE`."""

    settings: dict[str, Any]  # of its run, see `finetune.resolve.ResolvedRun`
    best_epoch: Number
    epochs: list[dict[str, Number]]
    scores: dict[str, dict[str, float]]  # split -> metric -> value, of the best epoch
    intervals: dict[str, dict[str, Sequence[float]]]  # split -> metric -> [low, high], of 95 % confidence
    confusion: dict[str, list[list[int]]]  # split -> counts: rows by label, columns by predicted label
    label_scores: dict[str, LabelScores]  # split -> label -> precision, recall, f1, support
    collapsed: list[str]  # splits for which the same is predicted for all records
    temperature: float | None  # fitted on validation; None if the kind has no probabilities of labels
    calibration: dict[str, dict[str, float]]  # split -> `ece`, `calibrated_ece`


def write_results(run: ResolvedRun, records: Mapping[int, SeedRecord]) -> dict[str, Any]:
    """Write results.json, confusion.png and curves.png. Returns the content of results.json.

    The confusion matrix is summed over the seeds; it is of the test split, or of validation if test has no labels.
    """
    from finetune.results.figures import draw_confusion, draw_curves  # matplotlib takes a quarter of a second

    folder, task, labels = run.folder.path, run.task.kind.config, run.task.kind.labels
    first = next(iter(records.values()))
    confusions = {
        split: np.sum([record.confusion[split] for record in records.values()], axis=0)
        for split in first.confusion
        if all(split in record.confusion for record in records.values())  # earlier versions had them for any labels
    }
    results = _combine(run, records, confusions)
    if confusions:
        split, confusion = list(confusions.items())[-1]
        title = f"{task.name}, {split}, {counted(len(records), 'seed')}"
        draw_confusion(folder / "confusion.png", confusion, labels, title)
    curves = {seed: record.epochs for seed, record in records.items()}
    best = {seed: record.best_epoch for seed, record in records.items()}
    if any(curves.values()):
        draw_curves(folder / "curves.png", curves, best, task.metric)
    write_json(run.folder.results, results)
    return results


def _combine(
    run: ResolvedRun, records: Mapping[int, SeedRecord], confusions: Mapping[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """Return the content of results.json. confusions: split -> CC counts, of all seeds together."""
    task, labels = run.task.kind.config, run.task.kind.labels
    first, by_seed = next(iter(records.values())), list(records.values())
    return {
        "task": task.name,
        "kind": task.kind,
        "init": str(run.model.folder) if run.model.pretrained else "random",
        "metric": task.metric,
        "labels": list(labels),
        "seeds": list(records),
        "collapsed": {str(seed): record.collapsed for seed, record in records.items() if record.collapsed},
        "best_epochs": [record.best_epoch for record in by_seed],
        "splits": {
            split: {
                name: _summarize(split, name, by_seed)
                for name in metrics
                if all(name in record.scores[split] for record in by_seed)  # earlier versions had fewer
            }
            for split, metrics in first.scores.items()
        },
        "label_scores": {split: _label_scores(split, by_seed) for split in first.label_scores},
        "confusions": {
            split: top_confusions(np.flatnonzero(matrix), matrix[matrix > 0], labels)
            for split, matrix in confusions.items()
        },
        "temperatures": [record.temperature for record in by_seed],
        "calibration": {
            split: {name: summarize([record.calibration[split][name] for record in by_seed]) for name in errors}
            for split, errors in first.calibration.items()
        },
    }


def _summarize(split: str, metric: str, records: Sequence[SeedRecord]) -> dict[str, Any]:
    """Return a metric over the seeds, with the mean of the confidence intervals of each seed if it has one."""
    summary: dict[str, Any] = summarize([record.scores[split][metric] for record in records])
    intervals = [record.intervals[split][metric] for record in records if metric in record.intervals[split]]
    return {**summary, "interval": np.mean(intervals, axis=0).tolist()} if intervals else summary


def _label_scores(split: str, records: Sequence[SeedRecord]) -> dict[str, Any]:
    """Label -> {precision, recall, f1: each over the seeds; support}."""
    by_seed = [record.label_scores[split] for record in records]
    return {
        label: {
            **{name: summarize([scores[label][name] for scores in by_seed]) for name in ("precision", "recall", "f1")},
            "support": by_seed[0][label]["support"],
        }
        for label in by_seed[0]
    }
