import csv
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from finetune.data.columns import Columns, LabelColumn, TextColumn, TextsColumn
from finetune.data.formats import FileFormat, Row, read_rows
from finetune.data.records import read_table
from finetune.kinds.question_answering import QuestionAnsweringColumns

SWALLOWED = '1\t" he said\n0\tthey left\n0\tshe did "\n1\tno\n'

DREAM = [
    [
        ["M: Hello.", "W: Hi."],
        [
            {"question": "Who?", "choice": ["A", "B", "C"], "answer": "B"},
            {"question": "When?", "choice": ["1", "2", "3"], "answer": "3"},
        ],
        "5-510",
    ],
    [["W: Bye."], [{"question": "Why?", "choice": ["x", "y"], "answer": "x"}], "5-511"],
]
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Paris is big.",
                    "qas": [
                        {"id": "q1", "question": "What?", "answers": [{"text": "Paris", "answer_start": 0}]},
                        {"id": "q2", "question": "Not?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}

DOCUMENT = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

\t
-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
"""


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
        cells(path, FileFormat(csv=CsvFormat(as_flags=False)))
    assert len(cells(path, FileFormat(csv=CsvFormat(quoting=csv.QUOTE_NONE)))) == 4


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_quote_that_may_have_swallowed_rows_of_a_csv_file_is_named(
    end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches rows that vanish silently, and texts with commas and line breaks that are rejected."""
    path = tmp_path / "a.csv"
    path.write_text(f"label,text\n{SWALLOWED}".replace("\t", ",").replace("\n", end))
    assert len(cells(path)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:2: a quoted field spans 3 lines that look like rows: is its quote an ordinary character? "
        "Then set --quoting 3"
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
    with pytest.raises(
        UserError, match=r"data\.dat: expected a file that ends in \.csv, .*, set the format, as --format csv"
    ):
        cells(path)


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.place, dict(zip(row.names, row.cells, strict=True))) for row in read_rows(path, FileFormat())]


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_list_of_objects(tmp_path: Path, wrapped: bool) -> None:
    """Catches .json and .json.gz being rejected, and a row that a message cannot name."""
    objects = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": objects} if wrapped else objects).encode()))
    assert read(path) == [(f"{path}, row 1", objects[0]), (f"{path}, row 2", objects[1])]


def test_json_lines_called_json(tmp_path: Path) -> None:
    """Catches the .json files of CLUE and others, which hold an object per line, being rejected."""
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read(path) == [(f"{path}:1", {"text": "a"}), (f"{path}:2", {"text": "b"})]
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.json:2: expected one JSON object per line"):
        read(path)


def test_a_folder_of_objects(tmp_path: Path) -> None:
    """Catches CLOTH's files, one passage each in middle/ and high/, read in an order that the disk decides, and copies
    that editors and macOS hide."""
    for name in ("middle/middle2", "high/high1", "middle/middle1"):
        write(tmp_path / f"{name}.json", {"article": name, "options": [["a", "b"]], "answers": ["A"]})
    for hidden in (".old/high1.json", "high/._high1.json", "__MACOSX/high1.json"):
        write(tmp_path / hidden, {})
    (tmp_path / "README.md").write_text("not data")
    found = read(tmp_path)
    assert [cells["article"] for _, cells in found] == ["high/high1", "middle/middle1", "middle/middle2"]
    assert found[0][0] == str(tmp_path / "high" / "high1.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without \.json files$"):
        read(empty)
    write(empty / "train-00000-of-00001.parquet", {})
    with pytest.raises(UserError, match=r"a folder without \.json files; .* Parquet files as hub:/.*/empty:SPLIT"):
        read(empty)


def test_dialogues_with_questions(tmp_path: Path) -> None:
    """Catches DREAM's and C3's lists read as one row per dialogue, or questions with the dialogue of another."""
    found = [cells for _, cells in read(write(tmp_path / "dream.json", DREAM))]
    assert [cells["question"] for cells in found] == ["Who?", "When?", "Why?"]
    assert found[1] == {
        "context": "M: Hello.\nW: Hi.",
        "question": "When?",
        "choices": ["1", "2", "3"],
        "answer": "3",
        "id": "5-510",
    }
    assert found[2]["context"] == "W: Bye."


def test_paragraphs_with_questions(tmp_path: Path) -> None:
    """Catches SQuAD's questions without answers being lost, and answers without their positions."""
    first, second = (cells for _, cells in read(write(tmp_path / "squad.json", SQUAD)))
    assert first == {
        "title": "T",
        "context": "Paris is big.",
        "question": "What?",
        "answers": {"text": ["Paris"], "answer_start": [0]},
        "id": "q1",
    }
    assert second["answers"] == {"text": [], "answer_start": []}


def test_questions_without_ids(tmp_path: Path) -> None:
    """Catches a file that is rejected for the lack of a field that nothing reads."""
    asked = {"question": "What?", "answers": []}
    path = write(tmp_path / "a.json", {"data": [{"paragraphs": [{"context": "Paris is big.", "qas": [asked]}]}]})
    ((_, found),) = read(path)
    assert (found["question"], found["id"]) == ("What?", None)


def test_a_spreadsheet_is_to_be_exported(tmp_path: Path) -> None:
    """Catches the advice to read an Excel file as CSV."""
    with pytest.raises(UserError, match=r"a\.xlsx: expected .*; export a spreadsheet as CSV$"):
        cells(tmp_path / "a.xlsx")


def test_a_test_split_without_answers_has_no_labels(tmp_path: Path) -> None:
    """Catches questions whose answers are not known scored as questions that have none."""
    asked = {"id": "q", "question": "What?"}
    paragraphs = [{"context": "Paris is big.", "qas": [asked, asked]}]
    path = write(tmp_path / "test.json", {"data": [{"title": "T", "paragraphs": paragraphs}]})
    assert not read_table(path, QuestionAnsweringColumns(), targets_required=False).labelled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.json: invalid JSON: Expecting value"),
        ('[{"text": "a"}', r"a\.json: invalid JSON: Expecting"),
        ('[{"text": "a"}, 3]', r"a\.json, item 2: expected a list of objects, .*, found 3"),
        ('[[["line"], [{"question": "q"}], "id"]]', r"a\.json, item 1: expected a list of objects"),
        ('{"data": {"text": "a"}}', r"a\.json: expected a list of objects, .*, found \{'text'"),
        ('"text"', r"a\.json: expected a list of objects, .*, found text"),
    ],
)
def test_other_json_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    """Catches a traceback, and a message that does not say what is expected."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


class ParquetColumns(Columns):
    label: LabelColumn = "label"
    text: TextColumn = "text"
    choices: TextsColumn = "choices"


def test_texts_lists_and_numbers(tmp_path: Path) -> None:
    """Catches lists and whole numbers that arrive as something else than in JSON, and rows of later batches lost."""
    path = tmp_path / "a.parquet"
    columns = {"label": [1, 0], "text": ["one", "two"], "choices": [["a", "b"], []], "idx": [0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1)
    table = read_table(path, ParquetColumns())
    assert [dict(record.values) for record in table.records] == [
        {"label": "1", "text": "one", "choices": ["a", "b"]},
        {"label": "0", "text": "two", "choices": []},
    ]
    assert table.records[1].place == f"{path}, row 2"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """Catches a traceback of pyarrow, and an empty line after its message."""
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: No such file"):
        read_table(path, ParquetColumns())
    with pytest.raises(UserError, match=r"No such file.*; name a split of several files as hub:/.*:SPLIT"):
        read_table(tmp_path / "train-*.parquet", ParquetColumns())
    path.write_bytes(b"PAR1, and then nothing")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .*Parquet"):
        read_table(path, ParquetColumns())
    path.write_bytes(b"PAR1\xff\x01\0\0\0PAR1")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .*thrift.*[^\n]\Z"):
        read_table(path, ParquetColumns())
    pyarrow.parquet.write_table(pyarrow.table({"label": ["1", None], "text": ["a", "b"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'choices'; found: label, text"):
        read_table(path, ParquetColumns())


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (pyarrow.array([0, 2**62], pyarrow.timestamp("us")), "date value out of range"),
        (pyarrow.array([None, 0], pyarrow.timestamp("us", "Mars/Olympus")), ".*Mars/Olympus"),
        (pyarrow.array([b"a", b"\xe9"]).view(pyarrow.string()), "'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_cells_that_python_cannot_represent(tmp_path: Path, cells: pyarrow.Array, problem: str) -> None:
    """Catches a traceback, also for a column that the task does not read."""
    path = tmp_path / "a.parquet"
    columns = {"label": ["1", "0"], "text": ["a", "b"], "choices": [["a"], []]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "other": cells}), path)
    assert len(read_table(path, ParquetColumns()).records) == 2
    pyarrow.parquet.write_table(pyarrow.table({**columns, "text": cells}), path)
    with pytest.raises(UserError, match=rf"a\.parquet, row 2: cannot read 'text': {problem}"):
        read_table(path, ParquetColumns())


def rows(path: Path, text: str) -> list[Row]:
    path.write_text(text, encoding="utf-8")
    return list(read_rows(path, FileFormat("conll")))


def named(row: Row) -> dict[str, object]:
    return dict(zip(row.names, row.cells, strict=True))


def test_sentences_with_their_tags(tmp_path: Path) -> None:
    """Catches document borders and blank lines taken for sentences, and tags from the wrong column."""
    path = tmp_path / "eng.train"
    found = rows(path, DOCUMENT)
    assert [row.place for row in found] == [f"{path}:3", f"{path}:9"]
    assert named(found[0]) == {
        "0": ["EU", "rejects"],
        "1": ["NNP", "VBZ"],
        "2": ["B-NP", "B-VP"],
        "3": ["B-ORG", "O"],
        "tokens": ["EU", "rejects"],
        "tags": ["B-ORG", "O"],
    }
    assert named(found[1])["tags"] == ["B-PER"]


def test_tabs_and_one_column(tmp_path: Path) -> None:
    """Catches tokens with spaces torn apart, tokens that are a space lost, and tokens given as their own tags."""
    found = rows(tmp_path / "a.conll", "New York\tB-LOC\n\u3000\tO\n \tO\n\n \n 我 \tO\n")
    assert named(found[0])["tokens"] == ["New York", "\u3000", " "]
    assert len(found) == 2
    assert named(rows(tmp_path / "a.conll", "one\r\ntwo\r\n")[0]) == {"0": ["one", "two"], "tokens": ["one", "two"]}


def test_a_line_of_another_width_is_rejected(tmp_path: Path) -> None:
    """Catches a tag lost from a line, which shifts or drops labels silently."""
    with pytest.raises(UserError, match=r"a\.conll:3: expected 2 columns, found 1"):
        rows(tmp_path / "a.conll", "EU B-ORG\n\nrejects\n")
