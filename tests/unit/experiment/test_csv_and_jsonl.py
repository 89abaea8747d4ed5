import io
import itertools
from collections.abc import Iterator

import pytest

from experiment import csv_and_jsonl
from experiment.csv_and_jsonl import (
    CsvFormat,
    column_index,
    listed,
    looks_like_header,
    raw_lines,
    read_csv,
    read_json_lines,
)
from experiment.errors import UserError
from experiment.files import text_lines


def test_rows_are_read_one_by_one() -> None:
    """Catches a file that is read into memory before its first row is used."""
    names, rows = read_csv((f"{number},x\n" for number in itertools.count()), "f", CsvFormat(header=False))
    assert names == ["0", "1"]
    assert [row.line for row in itertools.islice(rows, 3)] == [1, 2, 3]
    objects = read_json_lines(('{"a": 1}\n' for _ in itertools.count()), "f")
    assert next(objects) == (1, {"a": 1})


def test_a_row_is_found_where_it_begins() -> None:
    """Catches lines counted as rows, after empty lines and line breaks inside quotes."""
    lines = ["a,b\r\n", "\r\n", '1,"x\n', 'y"\n', "2,z\n", "3\n"]
    names, rows = read_csv(lines, "f.csv", CsvFormat())
    assert names == ["a", "b"]
    assert [next(rows), next(rows)] == [(3, ["1", "x\ny"], 0), (5, ["2", "z"], 0)]
    with pytest.raises(UserError, match=r"f\.csv:6: expected 2 columns, found 1; is the separator ','"):
        next(rows)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["text", "label"], True),
        (["Quality", "#1 ID", "Score (1-5)", "_id", "文本"], True),
        (["a stirring , funny film", "1"], False),
        (["label", "label"], False),
        (["", "text"], False),
        (["It was good.", "positive"], False),
        (["nothing was as good as this", "positive"], False),
        (["文本一", "您对服务是否满意", "カスタマーレビュー"], True),
        (["蚂蚁借呗是否等额还款", "借呗"], False),
        (["蚂蚁借呗等额还款可以换成先息后本吗", "借呗"], False),
        (["𠮷野家で牛丼を食べる人々〇𠮷", "𠮷野家"], False),
    ],
)
def test_what_looks_like_a_header(cells: list[str], expected: bool) -> None:
    """Catches data that is taken for names of columns, and unusual names that are taken for data."""
    assert looks_like_header(cells) is expected


def test_a_header_that_is_read_as_data_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a header that becomes a row silently, and a warning of data or of each reading of the file."""
    without_header = CsvFormat(header=False)
    for _ in range(2):
        read_csv(["text,label\n", "a good film,1\n"], "header.csv", without_header)
    read_csv(["a good film,1\n", "bad,0\n"], "data.csv", without_header)
    read_csv(["good,positive\n", "bad,negative\n"], "words.csv", without_header)
    assert caplog.messages == [
        "header.csv:1: this row is read as data; if it is a header (text, label), set --header 0"
    ]


def test_long_names_are_cut_off() -> None:
    """Catches a Chinese name of which nothing is left, because it has no spaces."""
    text = "这家餐厅的味道非常好服务员也很热情" * 3
    assert listed([text, "正面", "a\n b"]) == f"{text[:39]}…, 正面, a b"


def test_data_that_is_read_as_a_header_is_named() -> None:
    """Catches a message that lists the first row of data as names of columns, and does not say what to set."""
    row = ["a stirring , funny and finally transporting film", "1"]
    with pytest.raises(UserError, match=r"if the first row is data, set --header none and name columns by their num"):
        column_index(row, "text", "f:1", "--column", CsvFormat())
    with pytest.raises(
        UserError, match=r"stirring , funny and finally transpor…, 1 .* set task\.header: none and name"
    ):
        column_index(row, "text", "f:1", "task.columns.text", CsvFormat(as_flags=False))
    for csv_format in (None, CsvFormat(header=False)):
        with pytest.raises(UserError, match=r"names the column\)$"):
            column_index(row, "text", "f:1", "--column", csv_format)


def test_quotes_that_are_read_as_text_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Catches quotes around cells that become a part of the texts silently, and a warning of a quotation."""
    unquoted = CsvFormat("\t", quoting=3)
    for number, lines in enumerate(
        [
            ['"text"\t"label"\n', '"good"\t"1"\n'],
            ["text\tlabel\n", '"so ""good"""\t1\n'],
            ["text\tlabel\n", '"So good."\t1\n', '"No," she said, "no."\t0\n'],
        ]
    ):
        list(read_csv(lines, f"{number}.tsv", unquoted)[1])
    assert caplog.messages == [
        '0.tsv:1: quotes are read as a part of "text"; if they enclose cells, set --quoting 0',
        '1.tsv:2: quotes are read as a part of "so ""good"""; if they enclose cells, set --quoting 0',
    ]
    _, rows = read_csv(["a\tb\n", '"1\t2"\t3\n'], "f.tsv", unquoted)
    with pytest.raises(
        UserError, match=r"is the separator '\\t'\? If not, set --sep; if quotes enclose cells, set --quoting 0$"
    ):
        list(rows)


def test_a_tab_is_written_out_in_messages() -> None:
    """Catches a message with a gap in the place of the separator that was expected."""
    with pytest.raises(UserError, match=r"^f\.tsv:2: malformed row: '\\t' expected after '\"'; is the separator '\\t'"):
        list(read_csv(["a\tb\n", '"1" 2\t3\n'], "f.tsv", CsvFormat("\t"))[1])


def test_a_carriage_return_in_a_cell_is_named() -> None:
    """Catches Python's advice to open the file otherwise, and ours about quotes and the separator."""
    with pytest.raises(UserError, match=r"^f\.tsv:2: a carriage return \(\\r\) inside a cell; remove it, or .*'$"):
        list(read_csv(["a\tb\n", "1 \r2\t3\n"], "f.tsv", CsvFormat("\t"))[1])


def test_a_file_without_rows_has_no_columns() -> None:
    """Catches a StopIteration or an index error for an empty file."""
    nothing: list[str] = []
    for header in (True, False):
        names, rows = read_csv(nothing, "f", CsvFormat(header=header))
        assert (names, list(rows)) == ([], [])


def test_empty_cells_at_the_end_are_skipped() -> None:
    """Catches the empty rows below a table of Excel that are read as data, and one between others that is not."""
    lines = ["text,label\n", ",\n", "good,1\n", ",\n", ",,\n", "\n"]
    assert [row.line for row in read_csv(lines, "f.csv", CsvFormat())[1]] == [2, 3]
    assert [row.cells for row in read_csv(["a\n", "x\n", '""\n'], "f.csv", CsvFormat())[1]] == [["x"], [""]]


def test_bad_text_is_found_while_reading() -> None:
    """Catches an error that is raised before the good rows are read, or that does not say where it is."""

    def raw() -> Iterator[bytes]:
        yield "\ufeffa\n".encode()
        yield b"\xff\n"

    lines = text_lines(raw(), "f")
    assert next(lines) == "a\n"
    with pytest.raises(UserError, match=r"f:2: not UTF-8 text \(byte 0xff at column 1\)"):
        next(lines)


def test_a_line_larger_than_memory_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compressed file of a megabyte with a line of gigabytes, which uses up the memory of the machine."""
    monkeypatch.setattr(csv_and_jsonl, "_MAX_LINE", 10)
    stream = io.BytesIO(b"123456789\n" + b"x" * 100)
    lines = raw_lines(stream, "f")
    assert next(lines) == b"123456789\n"
    with pytest.raises(UserError, match="f:2: the line has more than 10 bytes"):
        next(lines)
    assert stream.tell() < 30


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"text": "a", "n": 1, "text": "b"}', "the key 'text' appears twice"),
        ('{"n": {"a": 1, "a": 1}}', "the key 'a' appears twice"),
        ('{"text": "a"\n', "Expecting ',' delimiter at column 13"),
        (f'{{"n": {"9" * 10_000}}}', "the number 999999999999… has 10,000 digits"),
        ('{"n": -' + "9" * 4300 + "}", "the number -99999999999… has 4,301 digits"),
        ('{"n": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_an_ambiguous_or_unreadable_row_is_rejected(row: str, problem: str) -> None:
    """Catches the last of two values taken silently, and tracebacks."""
    rows = read_json_lines(['{"text": "a", "n": 1}', row], "f")
    assert next(rows)[0] == 1
    with pytest.raises(UserError) as raised:
        next(rows)
    assert str(raised.value).startswith(f"f:2: expected one JSON object per line: {problem}")
    assert "\n" not in str(raised.value)


def test_a_column_must_be_there_once() -> None:
    """Catches the first of two columns of one name taken for the one that is meant."""
    assert column_index(["a", "b"], "b", "f:1", "--column") == 1
    with pytest.raises(UserError, match=r"f:1: no column 'c'; found: a, b \(--column names"):
        column_index(["a", "b"], "c", "f:1", "--column")
    with pytest.raises(UserError, match="f:1: 2 columns are called 'a'"):
        column_index(["a", "a"], "a", "f:1", "--column")


def test_rows_of_another_width_are_skipped_on_request(caplog: pytest.LogCaptureFixture) -> None:
    """Catches broken rows, as QQP has them, that are dropped silently or taken as they are."""
    lines = ["a,b\n", "1,2\n", "3\n", "4,5,6\n", "7,8\n"]
    _, rows = read_csv(lines, "f.csv", CsvFormat(on_bad_lines="skip"))
    assert [row.cells for row in rows] == [["1", "2"], ["7", "8"]]
    assert caplog.messages == ["f.csv: skipped 2 rows of another width than 2 columns, such as line 3"]
    list(read_csv(lines[:3], "g.csv", CsvFormat(on_bad_lines="skip"))[1])
    assert caplog.messages[1:] == ["g.csv: skipped 1 row of another width than 2 columns, such as line 3"]
    _, rows = read_csv(lines, "f.csv", CsvFormat())
    with pytest.raises(UserError, match=r"f\.csv:3: expected 2 columns, found 1"):
        list(rows)


def test_extra_columns_are_dropped_on_request() -> None:
    """Catches rows of STS-B lost because their source is named in two more columns, and rows that lack columns."""
    _, rows = read_csv(["1,2\n", "3,4,5\n", "6\n"], "f.csv", CsvFormat(header=False, on_bad_lines="drop_extra"))
    assert next(rows).cells == ["1", "2"]
    assert next(rows).cells == ["3", "4"]
    with pytest.raises(UserError, match=r"f\.csv:3: expected 2 columns, found 1"):
        next(rows)


def test_a_workbook_with_the_name_of_a_table() -> None:
    """Catches advice to convert the encoding of an Excel file, which never helps."""
    with pytest.raises(UserError, match=r"^a\.csv: a ZIP archive, such as a workbook of Excel; save the sheet as CSV"):
        list(text_lines([b"PK\x03\x04\x9b\n"], "a.csv"))
