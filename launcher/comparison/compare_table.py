"""The tables of a comparison: compare.json, compare.csv, compare.md, the report, and on stdout."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from experiment.files import write_json, write_text
from experiment.results.comparison import SCORES, TESTS, Cells, as_csv, as_markdown, score_cells, test_cells
from experiment.results.report import write_report
from experiment.run_folder import RunFolder
from launcher.comparison.cell_scores import CellScores
from launcher.comparison.row_tests import RowTest


def write_tables(folder: RunFolder, cells: Mapping[str, Sequence[CellScores]], tests: Sequence[RowTest]) -> None:
    """cells: by row; those that failed are left out."""
    comparison = {
        row: {cell.column: _as_json(row, cell, folder, tests) for cell in found} for row, found in cells.items()
    }
    write_json(folder.path / "compare.json", comparison)
    write_text(folder.path / "compare.csv", as_csv(comparison))
    write_text(folder.path / "compare.md", as_markdown(comparison))
    if any(comparison.values()):
        _print(SCORES, score_cells(comparison))
        _print(TESTS, test_cells(comparison))
        write_report(folder.path)
    print(f"{folder.path}/compare.json, compare.csv, compare.md, report/index.html")


def _as_json(row: str, cell: CellScores, folder: RunFolder, tests: Sequence[RowTest]) -> dict[str, Any]:
    found = asdict(cell)
    del found["column"], found["labels"]
    against = {
        test.second: {
            "difference": test.difference.mean,
            "interval": test.difference.interval,
            "p": test.difference.p,
        }
        for test in tests
        if (test.column, test.first) == (cell.column, row)
    }
    return {**found, "folder": str(cell.folder.path.relative_to(folder.path)), "against": against}


def _print(title: str, cells: Cells) -> None:
    header, *rows = cells
    if rows:
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
