import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from experiment.errors import UserError
from experiment.run_files.run_folder import RunFolder
from finetune.results import predictions
from finetune.results.predictions import DamagedPredictionsError, open_row_file, read_scored_split

ROWS: list[list[dict[str, Any]]] = [
    [{"row": 1, "spans": [[0, 2]], "p": 0.5, "note": None}],
    [{"row": 2, "spans": [], "p": 1.0, "note": "a"}],
]


def write(path: Path, interrupted: bool = False) -> Path:
    with open_row_file(path) as add:
        for rows in ROWS:
            add(rows)
            if interrupted:
                raise KeyboardInterrupt
    return path


def test_lists_and_missing_values(tmp_path: Path) -> None:
    """Catches Python's notation in a cell, and a Parquet type that fits only the first rows."""
    assert write(tmp_path / "a.csv").read_text().split() == [
        "row,spans,p,note",
        '1,"[[0,',
        '2]]",0.5,',
        "2,[],1.0,a",
    ]
    table = parquet.read_table(write(tmp_path / "a.parquet"))
    assert table.schema.types == ["int64", "string", "double", "string"]
    assert table.to_pylist() == [
        {"row": 1, "spans": "[[0, 2]]", "p": 0.5, "note": None},
        {"row": 2, "spans": "[]", "p": 1.0, "note": "a"},
    ]
    lines = write(tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row for rows in ROWS for row in rows]


def test_lists_of_numbers_in_parquet(tmp_path: Path) -> None:
    """Catches vectors that each reader has to parse, as text, also after a row without numbers."""
    path = tmp_path / "a.parquet"
    with open_row_file(path) as add:
        add([{"predicted": [0.5, -1.0], "scores": []}])
        add([{"predicted": [0.25, 0.0], "scores": [1.0]}, {"predicted": [1.0, 2.0], "scores": None}])
    table = parquet.read_table(path)
    assert [str(kind) for kind in table.schema.types] == ["list<element: double>"] * 2
    assert table["predicted"].to_pylist() == [[0.5, -1.0], [0.25, 0.0], [1.0, 2.0]]
    assert table["scores"].to_pylist() == [[], [1.0], None]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_file_is_complete_or_as_it_was(tmp_path: Path, name: str) -> None:
    """Catches the first rows of an interrupted prediction in place of a finished one."""
    before = write(tmp_path / name).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, interrupted=True)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_format_is_rejected(tmp_path: Path) -> None:
    """Catches CSV in a file called .xlsx."""
    with pytest.raises(UserError, match=r"a\.xlsx: expected a file that ends in \.csv, \.tsv, \.jsonl, \.parquet"):
        write(tmp_path / "a.xlsx")


def test_rows_do_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the file, or a traceback for a late number, if a column has no value for long."""
    monkeypatch.setattr(predictions, "_WAITING", 2)
    path = tmp_path / "a.parquet"
    rows = [{"start": start, "score": 0.5} for start in (None, None, 3, None)]
    with open_row_file(path) as add:
        add(rows[:2])
        add(rows[2:])
    table = parquet.read_table(path)
    assert table.schema.types == ["string", "double"]
    assert table["start"].to_pylist() == [None, None, "3", None]


def test_numbers_after_many_rows_without_any(tmp_path: Path) -> None:
    """Catches a Parquet column of text because the first rows have nulls, as the start of an answer may be."""
    path = tmp_path / "a.parquet"
    with open_row_file(path) as add:
        for row in ({"start": None, "score": 0.5}, {"start": 3, "score": 0.5}, {"start": None, "score": 1.0}):
            add([row])
    table = parquet.read_table(path)
    assert table.schema.types == ["int64", "double"]
    assert table["start"].to_pylist() == [None, 3, None]


def test_data_are_those_that_were_scored(trained_run: Path, tmp_path: Path) -> None:
    """Catches a comparison of predictions with the labels of a file that was edited since, with as many rows."""
    run = RunFolder(Path(shutil.copytree(trained_run, tmp_path / "run")))
    data = tmp_path / "test.tsv"
    shutil.copy(trained_run.parent / "test.tsv", data)
    files = {split: str(trained_run.parent / f"{split}.tsv") for split in ("train", "validation")} | {"test": str(data)}
    assert len(read_scored_split(run, "test", ["high", "low"], files, {}).records) == 20
    predictions = run.path / "seed-2" / "predictions-test.jsonl"
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DamagedPredictionsError, match=r"predictions-test\.jsonl is damaged: expected 20 .*, found 19"):
        read_scored_split(run, "test", ["high", "low"], files, {})
    data.write_text(data.read_text().replace("low", "high", 1))
    with pytest.raises(UserError, match=r"test\.tsv differs from the data that .*/seed-1 was scored on: it was"):
        read_scored_split(run, "test", ["high", "low"], files, {})
    (run.path / "seed-1" / "COMPLETE").write_text("{}")
    with pytest.raises(DamagedPredictionsError, match="COMPLETE is damaged"):
        read_scored_split(run, "test", ["high", "low"], files, {})
    (run.path / "seed-1" / "COMPLETE").unlink()
    with pytest.raises(DamagedPredictionsError, match="seed-1/COMPLETE does not exist"):
        read_scored_split(run, "test", ["high", "low"], files, {})
