"""The scores of a cell: of its fine-tuning run, or of the best run of its sweep."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json

_FITTED_ON = ("train", "validation")


@dataclass(frozen=True)
class CellScores:
    """The scores of a row for one column of the table: a task, or one of the test splits of a task."""

    column: str
    folder: RunFolder  # of the fine-tuning run
    split: str
    metric: str
    values: tuple[float, ...]  # by seed
    mean: float
    std: float | None  # None for one seed
    collapsed: int  # number of seeds
    labels: tuple[str, ...]
    chosen: Mapping[str, str]  # the point of the grid


def read_cell(task: str, folder: RunFolder, grid: bool) -> list[CellScores]:
    """The scores of a finished cell for each labelled test split; on validation if there is none.

    grid: whether the folder is that of a sweep. Raises UserError for a damaged file.
    """
    chosen: Mapping[str, str] = {}
    try:
        if grid:
            folder, chosen = _best_run(folder.path)
        results = parse_json((folder.path / "results.json").read_text(encoding="utf-8"))
        splits = [split for split in results["splits"] if split not in _FITTED_ON] or ["validation"]
        return [
            _scores(task if len(splits) == 1 else f"{task} {split}", folder, results, split, chosen) for split in splits
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the results in {folder.path} cannot be read: {type(error).__name__}: {error}") from None


def _best_run(sweep: Path) -> tuple[RunFolder, Mapping[str, str]]:
    """The folder and the grid point of the run of a sweep that is best on validation."""
    runs = parse_json((sweep / "sweep.json").read_text(encoding="utf-8"))
    name = runs["best"]
    return RunFolder(sweep / name), runs["runs"][name]["values"]


def _scores(
    column: str, folder: RunFolder, results: Mapping[str, Any], split: str, chosen: Mapping[str, str]
) -> CellScores:
    scores = results["splits"][split][results["metric"]]
    return CellScores(
        column=column,
        folder=folder,
        split=split,
        metric=results["metric"],
        values=tuple(scores["values"]),
        mean=scores["mean"],
        std=scores["std"],
        collapsed=len(results["collapsed"]),
        labels=tuple(results["labels"]),
        chosen=chosen,
    )
