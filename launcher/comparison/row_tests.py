"""Which rows of a comparison differ by more than chance, see `finetune.metrics.bootstrap`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from experiment.errors import UserError
from experiment.progress import track
from finetune.metrics.bootstrap import Difference, Scores, bootstrap_scores, compare_scores, draw_records
from finetune.results.scored_split import ScoredSplit, read_scored_split
from launcher.comparison.cell_scores import CellScores

RESAMPLES = 1000


@dataclass(frozen=True)
class RowTest:
    """The difference of two rows in one column."""

    column: str
    first: str
    second: str
    difference: Difference  # the score of `first` minus that of `second`


def test_rows(cells: Mapping[str, Sequence[CellScores]]) -> list[RowTest]:
    """All pairs of rows, by column. cells: by row. Raises UserError if data have changed since they were scored."""
    columns: dict[str, dict[str, CellScores]] = {}
    for row, scores in cells.items():
        for cell in scores:
            columns.setdefault(cell.column, {})[row] = cell
    return [test for column, by_row in columns.items() for test in _test_column(column, by_row)]


def _test_column(column: str, cells: Mapping[str, CellScores]) -> list[RowTest]:
    if len(cells) < 2:
        return []
    splits = {row: read_scored_split(cell.folder, cell.split, cell.labels) for row, cell in cells.items()}
    (count, *others) = {len(split.records) for split in splits.values()}
    if others:
        raise UserError(f"{column}: the rows were scored on {count:,} and {others[0]:,} records; run them again")
    records = draw_records(count, RESAMPLES)
    shown = track(enumerate(splits.items()), f"{column}: bootstrap", len(splits), "rows")
    scores: dict[str, Scores] = {}
    for stream, (row, split) in shown:
        scores[row] = bootstrap_scores(
            partial(ScoredSplit.score, split, cells[row].metric), len(split.predictions), records, stream
        )
    return [
        RowTest(column, a, b, compare_scores(cells[a].mean - cells[b].mean, scores[a], scores[b]))
        for a, b in combinations(cells, 2)
    ]
