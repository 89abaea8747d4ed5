"""The sections of a report about the runs of a sweep or a comparison, from the record in their folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import parse_json
from experiment.results.comparison import comparison_blocks
from experiment.results.page import Block, Figure, Heading, Table
from experiment.results.report.overlay import NamedRun, difference_blocks, open_runs, overlay_blocks, overlay_charts
from experiment.results.report.values import UNKNOWN, show
from experiment.results.sweep_summary import SweepResult, sort_results
from experiment.run_folder import RunFolder

_PRETRAINING = "pretrain"  # folder of a row, beside those of its tasks


def sweep_blocks(folder: RunFolder, directory: Path) -> list[Block]:
    """The runs of a sweep, best first, from DIR/sweep.json; empty if there is none. Raises UserError if damaged."""
    path = folder.path / "sweep.json"
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        lower, results = bool(record.get("lower_is_better", True)), _results(record["runs"])
        table = _sweep_table(sort_results(results, lower), str(record["metric"]))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'metric' and 'runs'") from None
    names = [result.name for result in results if (folder.path / result.name).is_dir()]
    runs = open_runs({name: RunFolder(folder.path / name) for name in names})
    image = folder.path / "sweep.png"
    figures = [Figure(image.read_bytes(), f"{record['metric']} by grid point")] if image.is_file() else []
    return [Heading("Sweep"), table, *figures, *overlay_blocks(runs, directory)]


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


def compare_blocks(folder: RunFolder, directory: Path) -> list[Block]:
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
    for number, (title, runs) in enumerate(groups.items(), start=1):
        blocks += [Heading(title), *difference_blocks(runs), *overlay_charts(runs, directory, f"{number}-")]
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
