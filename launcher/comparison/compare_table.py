"""The tables of a comparison: compare.json, compare.csv, compare.md, the report, and on stdout."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from experiment.files import write_json, write_text
from experiment.results.comparison import Cells, as_csv, as_markdown, tables
from experiment.run_folder import RunFolder
from launcher.comparison.cell_scores import CellScores
from launcher.comparison.row_tests import RowTest
from launcher.report import print_report


def write_tables(
    folder: RunFolder,
    cells: Mapping[str, Sequence[CellScores]],
    tests: Sequence[RowTest],
    failed: Mapping[str, str],
) -> None:
    """A report that cannot be written is a warning.

    Args:
        cells: by row; those that failed are left out.
        failed: name of a run -> how it failed.
    """
    comparison = {
        row: {cell.column: _as_json(row, cell, folder, tests) for cell in found} for row, found in cells.items()
    }
    write_json(folder.path / "compare.json", comparison)
    write_text(folder.path / "compare.csv", as_csv(comparison))
    write_text(folder.path / "compare.md", as_markdown(comparison, failed))
    for title, table in tables(comparison, failed).items():
        _print(title, table)
    print(f"{folder.path}/compare.json, compare.csv, compare.md")
    if any(comparison.values()):
        print_report("compare", folder.path)


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
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
