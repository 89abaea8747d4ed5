"""The sections of a report about several runs, also of a sweep or a comparison: charts and differences of configs."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.config import flatten
from experiment.errors import UserError
from experiment.files import parse_json
from experiment.results.charts import COLORS, Charts, DotChart, DotCharts, Dots, Line, Panel, Plot, charts_block, x_axis
from experiment.results.comparison import comparison_blocks
from experiment.results.page import Block, Heading, Table, Text
from experiment.results.report.run_facts import describe_state, read_run_config
from experiment.results.report.tasks import main_score, read_task_results
from experiment.results.report.training import (
    NORM,
    RATE,
    SPEED,
    UNKNOWN,
    WAIT,
    best_loss,
    curve,
    evaluated_corpora,
    median,
    read_own_steps,
    show,
    without_empty_columns,
)
from experiment.results.sweep_summary import SweepResult, metric_title, sort_results
from experiment.run_folder import SWEEP_RECORD, RunFolder
from experiment.run_life import read_life
from experiment.tracking.jsonl import Event, last_number, split_by_seed

_NOT_COMPARED = ("run.dir", "tracking.")  # keys
_DIFFERENCES = "Differences of the configs"
_PRETRAINING = "pretrain"  # folder of a row, beside those of its tasks


@dataclass(frozen=True)
class NamedRun:
    """A run as it is called in an overlay."""

    name: str
    folder: RunFolder
    events: Sequence[Event]
    seed: str = ""  # of its curves, if there are several
    color: str | None = None  # of its curves; default: the next of COLORS


def open_runs(folders: Mapping[str, RunFolder]) -> list[NamedRun]:
    """folders: by name."""
    return [NamedRun(name, folder, read_own_steps(folder)) for name, folder in folders.items()]


def name_runs(folders: Sequence[Path]) -> dict[str, RunFolder]:
    """Runs by their path below the folder that has all of them."""
    shared = os.path.commonpath([path.parent for path in folders]) if folders else ""
    return {str(path.relative_to(shared)): RunFolder(path) for path in folders}


def overlay_blocks(runs: Sequence[NamedRun]) -> list[Block]:
    """A table of the runs, the differences of their configs, and charts."""
    blocks: list[Block] = [runs_table(runs), *difference_blocks(runs)]
    charts = overlay_charts(runs)
    return [*blocks, Heading("Curves"), *charts] if charts else blocks


def overlay_charts(runs: Sequence[NamedRun]) -> list[Charts]:
    seeds = _split_by_seed(runs)
    return charts_block(list(_plots(seeds)), [x_axis(run.events) for run in seeds])


def _split_by_seed(runs: Sequence[NamedRun]) -> list[NamedRun]:
    """A run for each seed, in the color of the run; the runs themselves if none has several seeds."""
    by_run = [(run, split_by_seed(run.events)) for run in runs]
    if all(len(seeds) <= 1 for _, seeds in by_run):
        return list(runs)
    return [
        NamedRun(run.name, run.folder, events, "" if seed is None else f"seed {seed}", COLORS[number % len(COLORS)])
        for number, (run, seeds) in enumerate(by_run)
        for seed, events in seeds.items()
    ]


def _plots(runs: Sequence[NamedRun]) -> Iterator[Plot]:
    yield Plot("loss", [("Training loss", Panel("loss", _lines(runs, "loss", smoothed=True)))])
    for number, corpus in enumerate(dict.fromkeys(name for run in runs for name in evaluated_corpora(run.events))):
        loss = Panel("loss", _lines(runs, f"eval/{corpus}/loss", marked=True))
        accuracy = Panel("accuracy", _lines(runs, f"eval/{corpus}/accuracy", marked=True), percent=True)
        yield Plot(f"held-out-{number + 1}", [(f"Loss on {corpus}", loss), (f"Accuracy on {corpus}", accuracy)])
    yield Plot("learning-rate", [(RATE, Panel("learning rate", _lines(runs, "lr")))])
    yield Plot("gradient-norm", [(NORM, Panel("gradient norm", _lines(runs, "grad_norm", smoothed=True), "log"))])
    speed = Panel("tokens/s", _lines(runs, "tokens_per_second", smoothed=True), from_zero=True)
    wait = Panel("data wait", _lines(runs, "data_wait", smoothed=True), percent=True, from_zero=True)
    yield Plot("throughput", [(SPEED, speed), (WAIT, wait)])


def _lines(runs: Sequence[NamedRun], key: str, smoothed: bool = False, marked: bool = False) -> list[Line]:
    return [
        Line(
            run.name,
            *curve(run.events, key),
            smoothed=smoothed,
            marked=marked,
            color=run.color,
            run=number,
            seed=run.seed,
        )
        for number, run in enumerate(runs)
    ]


def runs_table(runs: Sequence[NamedRun]) -> Table:
    """How far each run is, and its best figures."""
    corpora = list(dict.fromkeys(name for run in runs for name in evaluated_corpora(run.events)))
    columns = ["run", "state", "steps", "tokens", "training loss", *(f"best loss, {name}" for name in corpora)]
    rows = [_run_row(run, corpora) for run in runs]
    return without_empty_columns([*columns, "score", "tokens/s"], rows, labels=2)


def _run_row(run: NamedRun, corpora: Sequence[str]) -> list[str]:
    events, results = run.events, read_task_results(run.folder)
    best = [best_loss(events, corpus) for corpus in corpora]
    return [
        run.name,
        "done" if results is not None else describe_state(read_life(run.folder)),
        show(max((event["step"] for event in events), default=None), ",.0f"),
        show(last_number(events, "tokens"), ",.0f"),
        show(last_number(events, "loss"), ".4f"),
        *(f"{found[0]:.4f} at {found[1]:,}" if found else UNKNOWN for found in best),
        UNKNOWN if results is None else main_score(results),
        show(median(events, "tokens_per_second"), ",.0f"),
    ]


def difference_blocks(runs: Sequence[NamedRun]) -> list[Block]:
    """The config keys whose values differ: a row each, or a column each if there are more runs than keys."""
    configs = {run.name: flatten(read_run_config(run.folder)) for run in runs}
    differing = differing_keys(list(configs.values()))
    if not differing:
        return [Text("The configs of these runs do not differ.")]
    cells = {name: [_cell(config, key) for key in differing] for name, config in configs.items()}
    if len(configs) > len(differing):
        table = Table(["run", *differing], [[name, *values] for name, values in cells.items()], _DIFFERENCES)
    else:
        rows = [[key, *(values[row] for values in cells.values())] for row, key in enumerate(differing)]
        table = Table(["key", *configs], rows, _DIFFERENCES)
    return [table]


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with different values, or that some configs do not have. A config that could not be read is left out."""
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config)
    missing = object()
    values = {key: [config.get(key, missing) for config in known] for key in keys if not key.startswith(_NOT_COMPARED)}
    return [key for key, found in values.items() if any(value != found[0] for value in found)]


def _cell(config: Mapping[str, Any], key: str) -> str:
    return UNKNOWN if key not in config else "null" if config[key] is None else str(config[key])


def sweep_blocks(folder: RunFolder) -> list[Block]:
    """The runs of a sweep, best first, from DIR/sweep.json; empty if there is none. Raises UserError if damaged."""
    path = folder.path / SWEEP_RECORD
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        lower, results = bool(record.get("lower_is_better", True)), _results(record["runs"])
        best_first = sort_results(results, lower)
        configs = [run.get("config", {}) for run in record["runs"].values()]
        metric = metric_title(str(record["metric"]), configs[0] if configs else {})
        table = _sweep_table(best_first, metric)
        values = {result.name: result.value for result in best_first if result.value is not None}
        scored = [Dots(name, [value], value) for name, value in values.items() if math.isfinite(value)]
        charts = [DotCharts("sweep", [DotChart(metric, scored)])] if scored else []
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'metric' and 'runs'") from None
    names = [result.name for result in results if (folder.path / result.name).is_dir()]
    runs = open_runs({name: RunFolder(folder.path / name) for name in names})
    return [Heading("Sweep"), table, *charts, *overlay_blocks(runs)]


def _results(runs: Mapping[str, Mapping[str, Any]]) -> list[SweepResult]:
    return [
        SweepResult(name, dict(run["values"]), str(run.get("state", "not done")), run.get("value"))
        for name, run in runs.items()
        if "values" in run
    ]


def _sweep_table(best_first: list[SweepResult], metric: str) -> Table:
    keys = list(dict.fromkeys(key for result in best_first for key in result.values))
    rows = [
        [result.name, result.state, *(result.values.get(key, UNKNOWN) for key in keys), show(result.value, ".4f")]
        for result in best_first
    ]
    return Table(["run", "state", *keys, metric], rows, "Best first", labels=2)


def compare_blocks(folder: RunFolder) -> list[Block]:
    """The tables of a comparison, and the curves of its runs by task, from DIR/compare.json; empty if there is none.

    Raises UserError for a damaged one.
    """
    path = folder.path / "compare.json"
    try:
        comparison = parse_json(path.read_text(encoding="utf-8"))
        blocks, groups = comparison_blocks(comparison), _groups(folder, comparison)
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected scores by row and task") from None
    for title, runs in groups.items():
        blocks += [Heading(title), *difference_blocks(runs), *overlay_charts(runs)]
    return blocks


def _groups(folder: RunFolder, comparison: Mapping[str, Mapping[str, Any]]) -> dict[str, list[NamedRun]]:
    """The runs whose curves belong together, by title: the pretrainings, and those of each task."""
    groups: dict[str, dict[str, RunFolder]] = {}
    for row, cells in comparison.items():
        for column, cell in cells.items():
            run = RunFolder(folder.path / cell["folder"])
            pretraining = RunFolder(folder.path / Path(cell["folder"]).parts[0] / _PRETRAINING)
            groups.setdefault(column, {})[row] = run
            if pretraining.metrics.is_file():
                groups.setdefault(_PRETRAINING, {})[row] = pretraining
    logged = {name: runs for name, runs in groups.items() if any(run.metrics.is_file() for run in runs.values())}
    return {f"Training: {name}": open_runs(runs) for name, runs in logged.items()}
