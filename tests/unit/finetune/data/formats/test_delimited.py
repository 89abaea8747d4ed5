import csv
import gzip
import logging
from pathlib import Path

import pytest

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from finetune.data.formats import FileFormat, read_rows

SWALLOWED = '1\t" he said\n0\tthey left\n0\tshe did "\n1\tno\n'


def cells(path: Path, file_format: FileFormat | None = None) -> list[list[object]]:
    return [list(row.cells) for row in read_rows(path, file_format or FileFormat())]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(tmp_path: Path, end: str) -> None:
    """Catches a file of an old Mac that is one long line, and lines counted wrongly in it."""
    path = tmp_path / "a.csv"
    path.write_bytes(f'label,text{end}1,one{end}0,"two{end}lines"{end}1,three'.encode())
    rows = list(read_rows(path, FileFormat()))
    assert [list(row.cells) for row in rows] == [["1", "one"], ["0", f"two{end}lines"], ["1", "three"]]
    assert [row.place for row in rows] == [f"{path}:2", f"{path}:3", f"{path}:5"]


def test_a_quote_that_swallows_rows_of_a_tsv_file_is_rejected(tmp_path: Path) -> None:
    """Catches rows that vanish in a quoted field because quotes are ordinary characters in the file."""
    path = tmp_path / "a.tsv"
    path.write_text("label\ttext\n" + SWALLOWED)
    with pytest.raises(UserError, match=r"a\.tsv:2: a quoted field spans 3 lines .* Then set task\.quoting: 3"):
        cells(path, FileFormat(csv=CsvFormat(quoting_key="task.quoting:")))
    assert len(cells(path, FileFormat(csv=CsvFormat(quoting=csv.QUOTE_NONE)))) == 4


def test_a_quote_that_may_have_swallowed_rows_of_a_csv_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches rows that vanish without a word, and texts with commas and line breaks that are rejected."""
    path = tmp_path / "a.csv"
    path.write_text("label,text\n" + SWALLOWED.replace("\t", ","))
    assert len(cells(path)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:2: a quoted field spans 3 lines that look like rows: is its quote an ordinary character? "
        "Then set quoting 3"
    ]


def test_texts_of_several_lines_are_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning for every letter or review with line breaks."""
    caplog.set_level(logging.INFO)
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(
            f'id{separator}text{separator}label\n1{separator}"Dear all,\nyes\nBye"{separator}a\n'
        )
        assert cells(tmp_path / name) == [["1", "Dear all,\nyes\nBye", "a"]]
    assert caplog.records == []


def test_a_format_may_be_named(tmp_path: Path) -> None:
    """Catches task.format ignored for a file whose name says nothing, or something else."""
    path = tmp_path / "data.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert cells(path, FileFormat("jsonl")) == [["a"]]
    path = tmp_path / "data.dat"
    path.write_text("a\tb\n1\t2\n")
    assert cells(path, FileFormat("csv")) == [["1", "2"]]
    with pytest.raises(UserError, match=r"data\.dat: expected a file that ends in \.csv, .*, set task\.format"):
        cells(path)
