"""`deepcloze compare`: finish the runs of a comparison, then test the differences of their scores and write the tables.

DIR/runs.json is the record of the runs, DIR/compare.json their scores, see `experiment.results.comparison`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from experiment.errors import UserError, reason, require_damage
from experiment.files import json_digest, read_json, write_json, write_text
from experiment.formatting import print_table
from experiment.progress import track
from experiment.results.comparison import Comparison, as_csv, as_markdown, score_charts, tables
from experiment.results.main_score import count_collapsed
from experiment.results.plots import draw_dots
from experiment.run_files.checkpoints import checkpoint_step, is_checkpoint_name
from experiment.run_files.run_folder import SWEEP_RECORD, RunFolder
from finetune.data.records import Table
from finetune.data.splits import related_records
from finetune.results.predictions import DamagedPredictionsError, ScoredSplit, read_scored_split
from finetune.scores.significance import (
    FEWEST_UNITS,
    Scores,
    bootstrap_scores,
    compare_scores,
    draw_records,
    percentile_interval,
)
from launcher.report import print_report
from launcher.run_sets.child_run import DONE
from launcher.run_sets.compare_plan import ComparePlan
from launcher.run_sets.run_set import PlannedRun, has_planned_seeds

RESAMPLES = 1000

_FITTED_ON = ("train", "validation")
_NOT_TESTED: Mapping[str, Any] = {"interval": None, "against": {}}

ScoresByRow = Mapping[str, Sequence["CellScores"]]
"""Row -> its cells, without the failed ones."""

Tests = Mapping[tuple[str, str], Mapping[str, Any]]
"""(column, row) -> the `interval` of its score, and `against`: another row -> difference of the scores, interval, p."""


@dataclass(frozen=True)
class CellScores:
    """The scores of a row for one column of the table: a task, or one of the test splits of a task."""

    column: str
    init_from: str  # "random", or the folder of the model
    step: int | None  # of its checkpoint
    folder: RunFolder  # of the fine-tuning run
    split: str
    chosen: Mapping[str, str]  # the point of the grid
    metric: str
    values: tuple[float, ...]  # by seed
    mean: float
    std: float | None  # None for one seed
    collapsed: int  # number of seeds, on this split
    labels: tuple[str, ...]
    files: Mapping[str, str]  # split -> where its data are now


def run_comparison(plan: ComparePlan) -> None:
    """Run all cells of a comparison whose plan has been checked, and write its tables.

    Raises UserError if the folder is in use or has runs of other configs, StoppedError if a signal or a full disk stops
    it early, and SystemExit if runs failed, after all others.
    """
    runs = plan.runs
    with runs.opened() as records:
        runs.finish(records)
        states = {run.name: records[run.name]["state"] for run in runs.runs}
        cells = {
            row: [cell for task, run in row_runs.items() for cell in _cells_of(plan, task, run, states[run.name])]
            for row, row_runs in plan.cells.items()
        }
        failed = {name: state for name, state in states.items() if state != DONE}
        if is_new := not _are_written(cells, runs.folder):
            _write_files(runs.folder, _comparison(cells, runs.folder, {}), failed)  # reports have them now
        try:
            tests = test_rows(cells)
        except UserError:
            if is_new:
                _write_tables(runs.folder, cells, {}, failed)  # the scores are finished
            raise
        _write_tables(runs.folder, cells, tests, failed)


def _cells_of(plan: ComparePlan, task: str, run: PlannedRun, state: str) -> list[CellScores]:
    """Return the scores of a cell, see `_read_cell`. Of a failed sweep, the best of its other runs, if any, unless it
    failed before it replaced the record of earlier seeds."""
    folder, files = plan.runs.run_folder(run), plan.files[task]
    if state == DONE:
        return _read_cell(task, folder, plan.grid, files)
    if plan.grid and has_planned_seeds(run, folder):
        with suppress(UserError):
            return _read_cell(task, folder, True, files)
    return []


def _read_cell(task: str, folder: RunFolder, grid: bool, files: Mapping[str, str]) -> list[CellScores]:
    """Return the scores of a finished cell for each test split that has the task's metric; on validation if there is
    none.

    grid: whether the folder holds a sweep. files: see `CellScores`. Raises UserError for a file that is damaged or
    cannot be read.
    """
    chosen: Mapping[str, str] = {}
    cell = folder.path
    path = cell / SWEEP_RECORD if grid else folder.results
    try:
        if grid:
            sweep = read_json(path)
            best = sweep["best"]  # on validation
            folder, chosen = RunFolder(cell / best), sweep["runs"][best]["values"]
            path = folder.results
        results = read_json(path)
        if grid:  # with task.metric in it, points choose their epochs by different ones; all cells report the same
            results["metric"] = sweep["metric"]
        scored = [split for split, scores in results["splits"].items() if results["metric"] in scores]
        splits = [split for split in scored if split not in _FITTED_ON] or ["validation"]
        columns = {task if len(splits) == 1 else f"{task} {split}": split for split in splits}
        return [_scores(column, folder, split, chosen, results, files) for column, split in columns.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        require_damage(error, f"{path} cannot be read")
        raise _damaged(cell, f"{path} is damaged: {type(error).__name__}: {reason(error)}") from None


def _damaged(cell: Path, problem: str) -> UserError:
    """Return the error of a damaged cell, DIR/ROW/TASK. A finished cell runs again only without its folder."""
    advice = f"to train this cell again, delete {cell} and run the same command again"
    return UserError(f"{'/'.join(cell.parts[-2:])}: {problem}; {advice}")


def _scores(
    column: str,
    folder: RunFolder,
    split: str,
    chosen: Mapping[str, str],
    results: Mapping[str, Any],
    files: Mapping[str, str],
) -> CellScores:
    metric, labels = results["metric"], tuple(results["labels"])
    scores, collapsed = results["splits"][split][metric], count_collapsed(results, split)
    values, mean, std = tuple(scores["values"]), scores["mean"], scores["std"]
    checkpoint = Path(results["init"]).parent
    step = checkpoint_step(checkpoint) if is_checkpoint_name(checkpoint.name) else None
    model = (results["init"], step)
    return CellScores(column, *model, folder, split, chosen, metric, values, mean, std, collapsed, labels, files)


def test_rows(cells: ScoresByRow) -> Tests:
    """Bootstrap the scores and test all pairs of rows in each column, see `significance.bootstrap_scores`. A split with
    too few units, such as texts with questions, has neither intervals nor p.

    Raises UserError if data have changed since they were scored, and for damaged predictions.
    """
    columns: dict[str, dict[str, CellScores]] = {}
    for row, scores in cells.items():
        for cell in scores:
            columns.setdefault(cell.column, {})[row] = cell
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for column, by_row in columns.items():
        resampled = _resample(column, by_row)
        for row, drawn in resampled.items():
            found[column, row] = {"interval": percentile_interval(drawn), "against": {}}
        for a, b in combinations(resampled, 2):
            test = compare_scores(by_row[a].values, by_row[b].values, resampled[a], resampled[b])
            found[column, a]["against"][b] = asdict(test)
    return found


def _resample(column: str, cells: Mapping[str, CellScores]) -> dict[str, Scores]:
    tables: dict[str, Table] = {}
    splits = {row: _read_split(cell, tables) for row, cell in cells.items()}
    (count, *others) = {len(split.records) for split in splits.values()}
    if others:
        raise UserError(f"{column}: the rows were scored on {count:,} and {others[0]:,} records; run them again")
    any_row = next(iter(splits.values()))
    units = related_records(any_row.records, any_row.kind.config.columns)
    resamples = RESAMPLES if len(units) >= FEWEST_UNITS else 0
    shown = track(enumerate(splits.items()), f"{column}: bootstrap", len(splits), "rows")
    scores: dict[str, Scores] = {}
    for stream, (row, split) in shown:
        samples = draw_records(units, resamples)
        scores[row] = bootstrap_scores(split.scorer(cells[row].metric), len(split.predictions), samples, stream)
    return scores


def _read_split(cell: CellScores, tables: dict[str, Table]) -> ScoredSplit:
    try:
        return read_scored_split(cell.folder, cell.split, cell.labels, cell.files, tables)
    except DamagedPredictionsError as error:
        run = cell.folder.path
        raise _damaged(run.parent if cell.chosen else run, str(error)) from None  # chosen: a run of the cell's sweep


def _write_tables(folder: RunFolder, cells: ScoresByRow, tests: Tests, failed: Mapping[str, str]) -> None:
    """Write compare.json, compare.csv, compare.md, compare.png and the report, and print the tables. A report that
    cannot be written is a warning. tests: empty if they failed. failed: name of a run -> how it failed."""
    comparison = _comparison(cells, folder, tests)
    _write_files(folder, comparison, failed)
    for title, (header, *rows) in tables(comparison, failed).items():
        print_table(header, rows, labels=len(header), title=title)
    print(f"{folder.path}/compare.json, compare.csv, compare.md")
    if any(comparison.values()):
        print_report("compare", folder.path)


def _write_files(folder: RunFolder, comparison: Comparison, failed: Mapping[str, str]) -> None:
    write_text(folder.path / "compare.csv", as_csv(comparison))
    write_text(folder.path / "compare.md", as_markdown(comparison, failed))
    if any(comparison.values()):
        draw_dots(folder.path / "compare.png", score_charts(comparison))
    write_json(folder.path / "compare.json", comparison)  # last: see `_are_written`


def _are_written(cells: ScoresByRow, folder: RunFolder) -> bool:
    """Return whether compare.json, and so the other tables, have these scores already, perhaps with tests."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        written = read_json(folder.path / "compare.json")
        scores = {
            row: {column: {**cell, **_NOT_TESTED} for column, cell in found.items()} for row, found in written.items()
        }
        return json_digest(scores) == json_digest(_comparison(cells, folder, {}))
    return False


def _comparison(cells: ScoresByRow, folder: RunFolder, tests: Tests) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        row: {cell.column: _as_json(cell, folder, tests.get((cell.column, row), _NOT_TESTED)) for cell in found}
        for row, found in cells.items()
    }


def _as_json(cell: CellScores, folder: RunFolder, tests: Mapping[str, Any]) -> dict[str, Any]:
    path = str(cell.folder.path.relative_to(folder.path))
    found = {name: value for name, value in vars(cell).items() if name not in ("column", "labels", "files")}
    return {**found, "folder": path, **tests}
