"""The results of all seeds together: results.json, confusion.png and curves.png."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.files import write_json
from experiment.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.metrics.scores import summarize, top_confusions
from finetune.results.figures import draw_confusion, draw_curves
from finetune.seed_record import SeedRecord


def write_results(
    folder: RunFolder, config: FinetuneConfig, labels: Sequence[str], records: Mapping[int, SeedRecord]
) -> dict[str, Any]:
    """Write results.json, confusion.png and curves.png. Returns the content of results.json.

    The confusion matrix is summed over the seeds; it is of the test split, or of validation if test has no labels.
    """
    first = next(iter(records.values()))
    confusions = {
        split: np.sum([record.confusion[split] for record in records.values()], axis=0) for split in first.confusion
    }
    results = _combine(config, labels, records, confusions)
    if confusions:
        split, confusion = list(confusions.items())[-1]
        title = f"{config.task.name}, {split}, {len(records)} seed{'s' if len(records) > 1 else ''}"
        draw_confusion(folder.path / "confusion.png", confusion, labels, title)
    curves = {seed: record.epochs for seed, record in records.items()}
    best = {seed: record.best_epoch for seed, record in records.items()}
    if any(curves.values()):
        draw_curves(folder.path / "curves.png", curves, best, config.task.metric)
    write_json(folder.path / "results.json", results)
    return results


def _combine(
    config: FinetuneConfig,
    labels: Sequence[str],
    records: Mapping[int, SeedRecord],
    confusions: Mapping[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """The content of results.json. confusions: split -> CC counts, of all seeds together."""
    first, by_seed = next(iter(records.values())), list(records.values())
    return {
        "task": config.task.name,
        "kind": config.task.kind,
        "init": config.model.init_from if config.model.weights == "pretrained" else "random",
        "metric": config.task.metric,
        "labels": list(labels),
        "seeds": list(records),
        "collapsed": [seed for seed, record in records.items() if record.collapsed],
        "best_epochs": [record.best_epoch for record in by_seed],
        "splits": {
            split: {name: _summarize(split, name, by_seed) for name in metrics}
            for split, metrics in first.scores.items()
        },
        "label_scores": {split: _label_scores(split, by_seed) for split in first.label_scores},
        "confusions": {split: top_confusions(matrix, labels) for split, matrix in confusions.items()},
        "temperatures": [record.temperature for record in by_seed],
        "calibration": {
            split: {name: summarize([record.calibration[split][name] for record in by_seed]) for name in errors}
            for split, errors in first.calibration.items()
        },
    }


def _summarize(split: str, metric: str, records: Sequence[SeedRecord]) -> dict[str, Any]:
    """A metric over the seeds, with the mean of the confidence intervals of each seed if it has one."""
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
