"""The results of all seeds together: results.json, confusion.png, curves.png and a table on stdout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiment.files import write_json
from experiment.results.report import UNKNOWN
from experiment.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.results.figures import draw_confusion, draw_curves
from finetune.results.metrics import summarize
from finetune.results.score_table import print_scores
from finetune.results.seed_run import SeedRecord


def write_results(
    folder: RunFolder, config: FinetuneConfig, labels: Sequence[str], records: Mapping[int, SeedRecord]
) -> dict[str, Any]:
    """Write results.json, confusion.png and curves.png. Returns the content of results.json.

    The confusion matrix is summed over the seeds; it is of the test split, or of validation if test has no labels.
    """
    first = next(iter(records.values()))
    results = {
        "task": config.task.name,
        "kind": config.task.kind,
        "init": config.model.init_from if config.model.weights == "pretrained" else "random",
        "metric": config.task.metric,
        "labels": list(labels),
        "seeds": list(records),
        "collapsed": [seed for seed, record in records.items() if record.collapsed],
        "best_epochs": [record.best_epoch for record in records.values()],
        "splits": {
            split: {name: _summarize(split, name, list(records.values())) for name in metrics}
            for split, metrics in first.scores.items()
        },
    }
    if first.confusion:
        split = list(first.confusion)[-1]
        confusion = np.sum([record.confusion[split] for record in records.values()], axis=0)
        title = f"{config.task.name}, {split}, {len(records)} seed{'s' if len(records) > 1 else ''}"
        draw_confusion(folder.path / "confusion.png", confusion, labels, title)
    curves = {seed: record.epochs for seed, record in records.items()}
    draw_curves(folder.path / "curves.png", curves, config.task.metric)
    write_json(folder.path / "results.json", results)
    return results


def _summarize(split: str, metric: str, records: Sequence[SeedRecord]) -> dict[str, Any]:
    """A metric over the seeds, with the mean of the confidence intervals of each seed if it has one."""
    summary: dict[str, Any] = summarize([record.scores[split][metric] for record in records])
    intervals = [record.intervals[split][metric] for record in records if metric in record.intervals[split]]
    return {**summary, "interval": np.mean(intervals, axis=0).tolist()} if intervals else summary


def print_results(results: Mapping[str, Any], path: Path) -> None:
    """Print the scores: mean ± standard deviation over the seeds. path: where results.json is."""
    print_scores(f"mean ± std of {len(results['seeds'])}", results["splits"], results["metric"], _mean_and_std)
    intervals = any("interval" in scores for split in results["splits"].values() for scores in split.values())
    note = "; in parentheses: 95 % confidence interval" if intervals else ""
    lines = [f"* selected the best epoch{note}", *_describe_collapsed(results), str(path)]
    Console().print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)


def _mean_and_std(scores: Mapping[str, Any]) -> str:
    cell = f"{scores['mean']:.4f} ± {UNKNOWN if scores['std'] is None else format(scores['std'], '.4f')}"
    if "interval" not in scores:
        return cell
    low, high = scores["interval"]
    return f"{cell} ({low:.4f} to {high:.4f})"


def _describe_collapsed(results: Mapping[str, Any]) -> list[str]:
    collapsed, seeds = results["collapsed"], results["seeds"]
    if not collapsed:
        return []
    named = ", ".join(map(str, collapsed))
    return [
        f"{len(collapsed)} of {len(seeds)} seeds collapsed ({named}): they predict the same for every row of a split"
    ]
