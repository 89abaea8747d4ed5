"""The results of a sweep: the metric of each run, one table and one chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError, reason
from experiment.files import read_json, write_text
from experiment.formatting import UNKNOWN, csv_table, print_table
from experiment.results.charts import DotChart, Dots
from experiment.results.main_score import count_collapsed
from experiment.run_files.metrics_file import read_events
from experiment.run_files.run_folder import RunFolder


@dataclass(frozen=True)
class SweepResult:
    """The result of one run of a sweep."""

    name: str  # of its folder
    values: Mapping[str, str]  # dotted config key -> raw text; the same keys in all runs of a sweep
    state: str  # "done", or how it failed
    value: float | None  # of the metric; None if the run has none
    collapsed: int | None = None  # seeds of a fine-tuning run
    seeds: int = 0
    std: float | None = None  # over the seeds, if there are several
    by_seed: Sequence[float] = ()

    def shown(self) -> str:
        """Return the value for a table, with its standard deviation and the share of collapsed seeds."""
        if self.value is None:
            return UNKNOWN if self.state == "done" else self.state
        collapsed = f" ({self.collapsed} of {self.seeds} seeds collapsed)" if self.collapsed else ""
        std = "" if self.std is None else f" ± {self.std:.4f}"
        return f"{self.value:.4f}{std}{collapsed}"


def read_metric(folder: RunFolder, metric: str, lower_is_better: bool | None = None) -> float | None:
    """Return the metric of a finished run: on validation in results.json, or its last value in metrics.jsonl. None
    without one, or if the last evaluation diverged.

    lower_is_better: for the metric that selects the best checkpoint, to return the value of that one. Raises UserError
    for a damaged results.json.
    """
    if folder.results.is_file():
        try:
            scores = read_json(folder.results)["splits"]["validation"]
            return float(scores[metric]["mean"]) if metric in scores else None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder.results} is damaged: {type(error).__name__}: {reason(error)}; to train this run again, "
                f"delete {folder.path} and run the same command again"
            ) from None
    values = [event[metric] for event in read_events(folder.metrics) if metric in event]
    if metric == "loss" or lower_is_better is not None:  # null if no step was trained on, or if it diverged
        values = [value for value in values if value is not None]
    if lower_is_better is not None:
        values.sort(reverse=lower_is_better)
    return float(values[-1]) if values and values[-1] is not None else None


def read_sweep_results(folder: RunFolder, runs: Mapping[str, Mapping[str, Any]], metric: str) -> list[SweepResult]:
    """Return the results of a sweep's runs, without points that were taken out of the grid. runs: of its record, by
    name."""
    return [
        SweepResult(
            name,
            dict(run["values"]),
            str(run.get("state", "not done")),
            run.get("value"),
            **(_read_seeds(RunFolder(folder.path / name), metric) if run.get("value") is not None else {}),
        )
        for name, run in runs.items()
        if "values" in run and not run.get("removed")
    ]


def _read_seeds(folder: RunFolder, metric: str) -> dict[str, Any]:
    """Return the fields of a result that a fine-tuning run has; a metric of validation."""
    try:
        results = read_json(folder.results)
        scores = results.get("splits", {}).get("validation", {}).get(metric, {})
        seeds = {"collapsed": count_collapsed(results, "validation"), "seeds": len(results["seeds"])}
        return {**seeds, "std": scores.get("std"), "by_seed": scores.get("values", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # pretraining, not done, or damaged, which `read_metric` reports


def metric_title(metric: str, config: Mapping[str, object]) -> str:
    """Return a metric with its split, which metrics of a pretraining run name themselves. config: of a run, flat."""
    return f"validation {metric}" if "task.kind" in config else metric


def sort_results(results: Sequence[SweepResult], lower_is_better: bool) -> list[SweepResult]:
    """Sort results, best first; those without a value come last."""
    sign = 1.0 if lower_is_better else -1.0
    return sorted(results, key=lambda result: math.inf if result.value is None else sign * result.value)


def sweep_charts(best_first: Sequence[SweepResult], metric: str) -> list[DotChart]:
    """Return a chart with a row for each result that has a finite value; empty if none has. metric: its name."""
    scored = [
        Dots(result.name, list(result.by_seed) or [result.value], result.value)
        for result in best_first
        if result.value is not None and math.isfinite(result.value)
    ]
    return [DotChart(metric, scored)] if scored else []


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Config key -> short label: its last part, or the whole key if another one ends in the same part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def write_summary(best_first: Sequence[SweepResult], output: Path, metric: str) -> None:
    """Write OUTPUT/sweep.csv, best run first, and OUTPUT/sweep.png, and print the table. metric: its name in tables and
    plots."""
    keys = list(best_first[0].values)
    rows = [[*run.values.values(), run.value, run.state, run.name, run.collapsed, run.std] for run in best_first]
    write_text(output / "sweep.csv", csv_table([[*keys, metric, "state", "folder", "collapsed", "std"], *rows]))
    if charts := sweep_charts(best_first, metric):
        from experiment.results.plots import draw_dots  # matplotlib takes a second

        draw_dots(output / "sweep.png", charts)
    print_table([*keys, metric], ([*result.values.values(), result.shown()] for result in best_first), labels=0)
    print(f"{output}/sweep.csv, sweep.json" + (", sweep.png" if charts else ""))
