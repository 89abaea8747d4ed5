"""The sections of a report about several runs, also of a sweep or a comparison: charts and differences of configs."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiment.config import flatten
from experiment.errors import UserError
from experiment.files import read_json
from experiment.formatting import UNKNOWN, counted, show
from experiment.results.charts import LOOKS, Charts, DotCharts, Line, Panel, Plot, charts_block, look, style
from experiment.results.comparison import Comparison, comparison_blocks
from experiment.results.main_score import main_score
from experiment.results.page import Block, Cell, Heading, RunRow, Runs, Table, Text
from experiment.results.report.run import OpenRuns, Run
from experiment.results.report.run_facts import describe_state, scaled
from experiment.results.report.training import optimization_plots
from experiment.results.sweep_summary import SweepResult, metric_title, read_sweep_results, sort_results, sweep_charts
from experiment.run_files.run_folder import COMPARISON_RECORD, SWEEP_RECORD, RunFolder, planned_folders

_OF_ROWS = tuple(f"task.{key}" for key in ("kind", "labels", "header", "quoting", "on_bad_lines", "columns.negative"))
_OF_DRAWN_SPLIT = tuple(
    f"task.{key}" for key in ("train", "validation_share", "split_seed", "columns.", "dialogue.group")
)
_OF_EVALUATION = ("masking.", "batch.max_seq_length", *_OF_ROWS)  # beginnings of keys
_NOT_COMPARED = ("run.dir", "tracking.")  # keys
_DIFFERENCES = "Differences of the configs"


def name_runs(folders: Sequence[Path]) -> dict[str, RunFolder]:
    """Name runs by their path below the folder that has all of them."""
    shared = os.path.commonpath([path.parent for path in folders]) if folders else ""
    return {str(path.relative_to(shared)): RunFolder(path) for path in folders}


def overlay_blocks(runs: Sequence[Run]) -> list[Block]:
    """Return a table of the runs, charts, and the differences of their configs."""
    return [runs_table(runs), *_evaluation_notes(runs), *_overlay_charts(runs), *difference_blocks(runs)]


def _evaluation_notes(runs: Sequence[Run]) -> list[Text]:
    """Say if runs were evaluated on a corpus of the same name in different ways."""
    corpora: dict[str, list[str]] = {}  # differing keys -> corpora
    for corpus in _corpora(runs):
        values: dict[str, set[str]] = {}
        for run in (run for run in runs if corpus in run.history.corpora):
            config = flatten(run.config)
            is_drawn = corpus == "validation" and not config.get("task.validation")
            keys = (*_OF_EVALUATION, *(_OF_DRAWN_SPLIT if is_drawn else ()))
            for key, value in config.items():
                is_file = key in (f"corpus.eval.{corpus}", f"task.{corpus}")
                if is_file or (key.startswith(keys) and key != "masking.schedule"):
                    last = value[-1] if key == "masking.rate" and isinstance(value, list) else value
                    values.setdefault(key, set()).add(str(last))
        if differing := ", ".join(key for key, found in values.items() if len(found) > 1):
            corpora.setdefault(differing, []).append(corpus)
    return [
        Text(f"Losses and accuracies on {', '.join(names)} may not be comparable: the runs differ in {differing}.")
        for differing, names in corpora.items()
    ]


def _numbers(runs: Sequence[Run]) -> list[int]:
    """Return a number for each run, for its look: 0 for the one that was started first; of runs that have not started,
    the last ones."""
    oldest_first = sorted(range(len(runs)), key=lambda place: runs[place].started or math.inf)
    return sorted(range(len(runs)), key=oldest_first.__getitem__)


def _overlay_charts(runs: Sequence[Run]) -> list[Charts]:
    several = any(len(run.history.seeds) > 1 for run in runs)
    seeds = [
        (number, run.name, f"seed {seed}" if several and seed is not None else "", history)
        for number, run in zip(_numbers(runs), runs, strict=True)
        for seed, history in run.history.seeds.items()
    ]

    def lines(key: str, smoothed: bool = False, marked: bool = False) -> list[Line]:
        return [
            Line(name, history.curve(key), smoothed=smoothed, marked=marked, look=number, run=axis, seed=seed)
            for axis, (number, name, seed, history) in enumerate(seeds)
        ]

    of_tasks = dict.fromkeys(str(run.results.get("metric")) for run in runs if run.results)
    plots = [Plot("loss", [Panel("loss", lines("loss", smoothed=True), title="Training loss")])]
    for number, corpus in enumerate(_corpora(runs), start=1):
        loss, accuracy = (lines(f"eval/{corpus}/{metric}", marked=True) for metric in ("loss", "accuracy"))
        panels = [
            Panel("loss", loss, title=f"Loss on {corpus}"),
            Panel("accuracy", accuracy, percent=True, title=f"Accuracy on {corpus}"),
        ]
        for metric in (name for name in of_tasks if name != "accuracy"):
            panels.append(Panel(metric, lines(f"eval/{corpus}/{metric}", marked=True), title=f"{metric} on {corpus}"))
        plots.append(Plot(f"held-out-{number}", panels))
    return charts_block([*plots, *optimization_plots(lines)], [history.axis for *_, history in seeds])


def _corpora(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.history.corpora))


def runs_table(runs: Sequence[Run]) -> Runs:
    """Return the progress and best figures of each run. At first, the charts show the runs that were started last, as
    many as have lines that differ; they come first."""
    corpora = _corpora(runs)
    columns = ["steps", "tokens", "training loss", *(f"best loss, {name}" for name in corpora), "score", "tokens/s"]
    cells = [_cells(run, corpora) for run in runs]
    known = [at for at in range(len(columns)) if any(row[at].value is not None for row in cells)]
    newest = {run.name for run in sorted(runs, key=lambda run: run.started)[-LOOKS:]}
    rows = []
    for number, run, row in zip(_numbers(runs), runs, cells, strict=True):
        (color, dash), shown = look(number), [row[at] for at in known]
        rows.append(RunRow(run.name, run.link, *describe_state(run), style(color), dash, run.name in newest, shown))
    return Runs([columns[at] for at in known], sorted(rows, key=lambda row: not row.shown))


def _cells(run: Run, corpora: Sequence[str]) -> list[Cell]:
    history = run.history
    step, tokens = run.step if history.seeds else None, history.last("tokens")
    best = [history.best_loss(corpus) for corpus in corpora]
    return [
        Cell(UNKNOWN if step is None else f"{step:,}{_of_total(step, run.config)}", step),
        Cell(UNKNOWN if tokens is None else scaled(tokens), tokens),
        _cell(history.last("loss"), ".4f"),
        *(_best_cell(*found) if found else _cell(None, "") for found in best),
        _score_cell(run),
        _cell(history.median("tokens_per_second"), ",.0f"),
    ]


def _cell(value: float | None, spec: str) -> Cell:
    return Cell(show(value, spec), value)


def _best_cell(loss: float, step: int | None) -> Cell:
    return Cell(f"{loss:.4f}{'' if step is None else f' at {step:,}'}", loss)


def _score_cell(run: Run) -> Cell:
    """Format the score: 'accuracy 0.8512 ± 0.0071 on test'."""
    if run.results is None or (score := main_score(run.results)) is None:
        return _cell(None, "")
    split, mean, std = score
    return Cell(f"{run.results['metric']} {mean:.4f}{'' if std is None else f' ± {std:.4f}'} on {split}", mean)


def _of_total(step: int, config: Mapping[str, Any]) -> str:
    with suppress(KeyError, TypeError):
        if (total := config["schedule"]["steps"]) > step:
            return f" of {total:,}"
    return ""


def difference_blocks(runs: Sequence[Run]) -> list[Block]:
    """Return the config keys whose values differ: a row each, or a column each if there are more runs than keys."""
    if len(runs) < 2:
        return []
    configs = {run.name: flatten(run.config) for run in runs}
    if not (differing := differing_keys(list(configs.values()))):
        return [Text("The configs of these runs do not differ.")]
    cells = {name: [_value(config, key) for key in differing] for name, config in configs.items()}
    if len(configs) > len(differing):
        return [Table(["run", *differing], [[name, *values] for name, values in cells.items()], _DIFFERENCES)]
    rows = [[key, *(values[row] for values in cells.values())] for row, key in enumerate(differing)]
    return [Table(["key", *configs], rows, _DIFFERENCES)]


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with different values, or that some configs do not have. A config that could not be read is left out."""
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config)
    missing = object()
    values = {key: [config.get(key, missing) for config in known] for key in keys if not key.startswith(_NOT_COMPARED)}
    return [key for key, found in values.items() if any(value != found[0] for value in found)]


def _value(config: Mapping[str, Any], key: str) -> str:
    return UNKNOWN if key not in config else "null" if config[key] is None else str(config[key])


def sweep_blocks(folder: RunFolder, open_runs: OpenRuns) -> list[Block]:
    """Return the runs of a sweep, best first, from DIR/sweep.json; empty without it. Raises UserError if damaged."""
    path = folder.path / SWEEP_RECORD
    try:
        record = read_json(path)
        results = read_sweep_results(folder, record["runs"], record["metric"])
        best_first = sort_results(results, bool(record.get("lower_is_better", True)))
        configs = [run.get("config", {}) for run in record["runs"].values()]
        metric = metric_title(str(record["metric"]), configs[0] if configs else {})
        table = _sweep_table(best_first, metric)
        charts = [DotCharts("sweep", found)] if (found := sweep_charts(best_first, metric)) else []
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'metric' and 'runs'") from None
    names = [result.name for result in results if (folder.path / result.name).is_dir()]
    runs = open_runs({name: RunFolder(folder.path / name) for name in names})
    return [Heading("Sweep"), table, *charts, *overlay_blocks(runs)]


def _sweep_table(best_first: list[SweepResult], metric: str) -> Table:
    keys = list(dict.fromkeys(key for result in best_first for key in result.values))
    rows = [
        [
            *(result.name, result.state),
            *(result.values.get(key, UNKNOWN) for key in keys),
            UNKNOWN if result.value is None else result.shown(),
        ]
        for result in best_first
    ]
    return Table(["run", "state", *keys, metric], rows, "Best first", labels=2)


def compare_blocks(folder: RunFolder, open_runs: OpenRuns) -> list[Block]:
    """Return the tables of a comparison, from DIR/compare.json, and the runs in DIR/runs.json, by task; empty for
    another folder.

    Raises UserError for a damaged file.
    """
    path, states = folder.path / "compare.json", _run_states(folder)
    has_scores = path.is_file()
    if not states and not has_scores:
        return []
    missing = [name for name, state in states.items() if not state]
    failed = {name: state for name, state in states.items() if state not in ("", "done")}
    try:
        comparison = read_json(path) if has_scores else {}
        scores, groups = comparison_blocks(comparison, failed), _groups(folder, states, comparison)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected scores by row and task") from None
    blocks: list[Block] = [Heading("Comparison")]
    if not has_scores:
        blocks.append(Text("The scores are compared when all runs are done."))
    elif missing:
        not_done = f"{len(missing):,} of {counted(len(states), 'run')}"
        blocks.append(Text(f"Not done: {not_done}. The scores are from the last time that all runs had ended."))
    blocks += scores
    for title, runs in groups.items():
        if any(run.metrics.is_file() for run in runs.values()):
            blocks += [Heading(f"Training: {title}"), *overlay_blocks(open_runs(runs))]
    return blocks


def _run_states(folder: RunFolder) -> dict[str, str]:
    """Return ROW/TASK or ROW/pretrain -> state of the run, "" if it has not ended, without runs that were removed from
    the config; empty without a record."""
    with suppress(OSError, ValueError, AttributeError):
        runs = read_json(folder.path / COMPARISON_RECORD)
        return {name: run.get("state", "") for name, run in runs.items() if not run.get("removed")}
    return {}


def _groups(folder: RunFolder, states: Mapping[str, str], comparison: Comparison) -> dict[str, dict[str, RunFolder]]:
    """Group the runs whose curves belong together, by title: pretraining runs, and the runs of each task, by row. Of a
    grid, the chosen point if the cell is done, or else all points."""
    cells = [(row, Path(cell["folder"])) for row, found in comparison.items() for cell in found.values()]
    names, chosen = {path.parts[0]: row for row, path in cells}, {folder.path / path for _, path in cells}
    groups: dict[str, dict[str, RunFolder]] = {}
    for name, state in states.items():
        path = folder.path / name
        row = names.get(path.parent.name, path.parent.name)
        points = planned_folders(path) or [path]
        shown = [point for point in points if state == "done" and point in chosen] or points
        for point in shown:
            label = row if len(shown) == 1 else f"{row}/{point.name}"
            groups.setdefault(path.name, {})[label] = RunFolder(point)
    return groups
