"""The tables of a comparison, `deepcloze compare`: its compare.json as CSV, as Markdown, on a terminal and in a report.

compare.json: row -> column -> `init_from`, `step` of that checkpoint, `metric`, `split`, `values` by seed, `mean`, its
95 % `interval`, `std`, `collapsed` seeds, `folder`, `chosen` point of the grid, and `against`: another row ->
`difference`, its 95 % `interval`, and `p`. Intervals and p are null if the split has too few texts. Files of version
0.2.0 have no models and no intervals of means.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiment.formatting import UNKNOWN, csv_table, escape_markdown, markdown_table, show
from experiment.results.charts import DotChart, DotCharts, Dots
from experiment.results.page import Block, Table, Text

Comparison = Mapping[str, Mapping[str, Mapping[str, Any]]]
Cells = list[list[str]]
"""Rows of a table, the first of which names its columns."""

SCORES = "Scores: mean ± standard deviation over the seeds"
INTERVALS = "Scores: a dot for each seed, their mean and its 95 % interval"
TESTS = (
    "Differences: 95 % interval and two-sided p, the more cautious of the Multi-Bootstrap (Sellam et al. 2022) over "
    "seeds and records and of Welch's test over seeds; they do not cover other seeds of pretraining"
)
MODELS = "Checkpoints"
FAILED = "Runs that failed"

_CSV_COLUMNS = ("row", "task", "split", "metric", "mean", "std", "values", "collapsed", "chosen", "folder")


def _score_cells(comparison: Comparison) -> Cells:
    """Return a row for each initialization, a column for each task."""
    columns = _columns(comparison)
    header = ["", *columns.values()]
    return [header] + [[row, *(_score(cells.get(column)) for column in columns)] for row, cells in comparison.items()]


def _model_cells(comparison: Comparison) -> Cells:
    """Return a row for each initialization that is a checkpoint."""
    first = {row: next(iter(cells.values()), {}) for row, cells in comparison.items()}
    steps = {row: (cell["init_from"], cell["step"]) for row, cell in first.items() if cell.get("step") is not None}
    return [["", "init_from", "step"], *([row, path, f"{step:,}"] for row, (path, step) in steps.items())]


def _test_cells(comparison: Comparison) -> Cells:
    """Return a row for each task and pair of initializations."""
    header = ["task", "row", "compared with", "difference", "95 % interval", "p"]
    interval = "{:+.4f} to {:+.4f}".format
    tests = [
        [
            *(column, row, other),
            f"{test['difference']:+.4f}",
            UNKNOWN if test["interval"] is None else interval(*test["interval"]),
            _p_value(test["p"], cell, comparison[other][column]),
        ]
        for row, cells in comparison.items()
        for column, cell in cells.items()
        for other, test in cell["against"].items()
    ]
    return [header, *sorted(tests, key=lambda cells: cells[0])]


def _p_value(p: float | None, *cells: Mapping[str, Any]) -> str:
    """Return p as text; "–" if it is unknown, and if all seeds of a cell have collapsed: its training has failed."""
    collapsed = any(cell["collapsed"] == len(cell["values"]) for cell in cells)
    return UNKNOWN if collapsed else show(p, ".3f")


def tables(comparison: Comparison, failed: Mapping[str, str]) -> dict[str, Cells]:
    """Return title -> table, without empty ones. failed: name of a run -> how it failed."""
    scores = _score_cells(comparison) if any(comparison.values()) else []
    failures = [["run", "what happened"], *map(list, failed.items())]
    found = {SCORES: scores, TESTS: _test_cells(comparison), MODELS: _model_cells(comparison), FAILED: failures}
    return {title: cells for title, cells in found.items() if len(cells) > 1}


def as_markdown(comparison: Comparison, failed: Mapping[str, str]) -> str:
    """Format as Markdown. failed: name of a run -> how it failed."""
    parts = []
    for title, cells in tables(comparison, failed).items():
        header, *rows = [[escape_markdown(cell) for cell in row] for row in cells]
        parts.append(f"{title}\n\n{markdown_table(header, rows)}")
    if any(comparison.values()):
        parts.append(f"![{INTERVALS}](compare.png)\n")
    return "\n".join(parts)


def as_csv(comparison: Comparison) -> str:
    """Return a row for each initialization and task."""
    table: list[Sequence[object]] = [_CSV_COLUMNS]
    for row, cells in comparison.items():
        for column, cell in cells.items():
            values = " ".join(map(str, cell["values"]))
            chosen = " ".join(f"{k}={v}" for k, v in cell["chosen"].items())
            found = {**cell, "values": values, "chosen": chosen}
            table.append([row, column, *(found[key] for key in _CSV_COLUMNS[2:])])
    return csv_table(table)


def score_charts(comparison: Comparison) -> list[DotChart]:
    """Return a chart for each task, with a row for each initialization."""
    charts = []
    for column, title in _columns(comparison).items():
        cells = {row: cells[column] for row, cells in comparison.items() if column in cells}
        charts.append(DotChart(title, [_dots(row, cell) for row, cell in cells.items()]))
    return charts


def _dots(row: str, cell: Mapping[str, Any]) -> Dots:
    """Convert a row to dots. Raises TypeError or ValueError for values that are no numbers."""
    if (interval := cell.get("interval")) is not None:
        low, high = interval
        interval = [float(low), float(high)]
    return Dots(row, [float(value) for value in cell["values"]], float(cell["mean"]), interval)


def comparison_blocks(comparison: Comparison, failed: Mapping[str, str]) -> list[Block]:
    """Return charts and tables for a report. failed: name of a run -> how it failed."""
    blocks: list[Block] = []
    if charts := score_charts(comparison):
        blocks += [Text(f"{INTERVALS}."), DotCharts("scores", charts)]
    for title, (columns, *rows) in tables(comparison, failed).items():
        blocks.append(Table(columns, rows, title, labels={TESTS: 3, MODELS: 2, FAILED: 2}.get(title, 1)))
    return blocks


def _columns(comparison: Comparison) -> dict[str, str]:
    """Return the columns with their titles, which name the metric, and the split unless it is `test` or in the name of
    the column."""
    found = {column: cell for cells in comparison.values() for column, cell in cells.items()}
    return {column: _title(column, cell) for column, cell in found.items()}


def _title(column: str, cell: Mapping[str, Any]) -> str:
    split = "" if cell["split"] == "test" or column.endswith(f" {cell['split']}") else f" on {cell['split']}"
    return f"{column}, {cell['metric']}{split}"


def _score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return UNKNOWN
    text = f"{cell['mean']:.4f} ± {show(cell['std'], '.4f')}"
    return f"{text} ({cell['collapsed']} of {len(cell['values'])} collapsed)" if cell["collapsed"] else text
