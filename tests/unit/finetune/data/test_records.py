import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from finetune.data.columns import Columns, LabelColumn, TextsColumn
from finetune.data.formats import FileFormat
from finetune.data.records import Table, read_table
from finetune.kinds.classification import ClassificationColumns
from finetune.kinds.question_answering import QuestionAnsweringColumns
from finetune.kinds.regression import RegressionColumns
from finetune.kinds.token_classification import TokenClassificationColumns as TokenColumns

COLUMNS = ClassificationColumns(text="text")
FEATURES = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def values(table: Table) -> list[dict[str, Any]]:
    return [dict(record.values) for record in table.records]


def test_csv_with_quotes_commas_and_windows_line_ends(tmp_path: Path) -> None:
    """Catches splitting at commas inside quotes, line ends kept in the last field, and lost typographic apostrophes."""
    path = write(tmp_path / "a.csv", 'id,text,label\r\n1,"Well, you’ve ""done"" it",joy\r\n2,No,anger\r\n')
    table = read_table(path, COLUMNS)
    assert values(table) == [{"label": "joy", "text": 'Well, you’ve "done" it'}, {"label": "anger", "text": "No"}]
    assert [record.place for record in table.records] == [f"{path}:2", f"{path}:3"]


def test_headerless_tsv_by_column_number(tmp_path: Path) -> None:
    """Catches a first row that is lost as a header, and columns counted from 1."""
    path = write(tmp_path / "a.tsv", "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n")
    table = read_table(path, ClassificationColumns(label="1", text="3"), FileFormat(csv=CsvFormat(header=False)))
    assert values(table) == [{"label": "1", "text": "One."}, {"label": "0", "text": "Two."}]
    assert table.records[0].place == f"{path}:1"


def test_data_read_as_a_header_by_column_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a first row that is lost as a header silently where columns are numbers."""
    by_number = ClassificationColumns(label="1", text="0")
    path = write(tmp_path / "a.csv", "a stirring film,1\nbad,0\n")
    assert len(read_table(path, by_number)) == 1
    assert caplog.messages == [
        f"{path}:1: column names that look like data: a stirring film, 1; if the first row is data, set --header none "
        "and name columns by their numbers, from 0"
    ]
    caplog.clear()
    read_table(write(tmp_path / "b.csv", "Review Text,Label (0-1)\na stirring film,1\n"), by_number)
    read_table(write(tmp_path / "c.csv", ",text,label\n0,a stirring film,1\n"), COLUMNS)
    assert caplog.messages == []


def test_byte_order_mark_and_ordinary_quotes(tmp_path: Path) -> None:
    """Catches a BOM glued to the first column's name, and quote characters that swallow tabs when quoting is off."""
    path = write(tmp_path / "a.tsv", '\ufefflabel\ttext\n1\t" he said\n0\tshe "did\n')
    table = read_table(path, COLUMNS, FileFormat(csv=CsvFormat(quoting=csv.QUOTE_NONE)))
    assert values(table) == [{"label": "1", "text": '" he said'}, {"label": "0", "text": 'she "did'}]


def test_unbalanced_quotes_are_rejected_with_a_hint(tmp_path: Path) -> None:
    """Catches rows that silently disappear inside a quoted field which never ends."""
    path = write(tmp_path / "a.tsv", 'label\ttext\n1\t" he said\n0\tshe did\n')
    with pytest.raises(UserError, match=r"a\.tsv:2: malformed row: .*set --quoting 3"):
        read_table(path, COLUMNS)


def test_jsonl_reads_texts_and_simple_labels(tmp_path: Path) -> None:
    """Catches labels that are numbers or booleans in JSON being rejected or written as Python writes them. 1.0 is how
    pandas stores 1 beside empty cells."""
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": True}, {"text": "c", "label": "x", "more": None}]
    rows += [{"text": "d", "label": 1.0}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert [row["label"] for row in values(read_table(path, COLUMNS))] == ["1", "true", "x", "1"]


def test_columns_of_a_csv_file_may_be_numbers(tmp_path: Path) -> None:
    """Catches a number looked up as a name, in a file with a header, and one that wins over a name."""
    columns = COLUMNS.model_copy(update={"label": "3", "text": "1"})
    path = write(tmp_path / "a.tsv", "id\tsentence\tsource\tclass\n7\tgood\tweb\tx\n")
    assert values(read_table(path, columns)) == [{"label": "x", "text": "good"}]
    assert values(read_table(path, columns, targets_required=False)) == [{"label": "x", "text": "good"}]
    path = write(tmp_path / "b.tsv", "3\tid\t1\nx\t7\tgood\n")
    assert values(read_table(path, columns)) == [{"label": "x", "text": "good"}]
    path = write(tmp_path / "c.tsv", "id\tsentence\n7\tgood\n")
    assert values(read_table(path, columns, targets_required=False)) == [{"text": "good"}]
    with pytest.raises(UserError, match=r"c\.tsv:1: no column '3'"):
        read_table(path, columns)
    with pytest.raises(UserError, match=r"d\.jsonl:1: no column '3'"):
        read_table(write(tmp_path / "d.jsonl", '{"a": "", "1": "", "b": "", "c": ""}\n'), columns)


def test_gzip_and_chosen_separator(tmp_path: Path) -> None:
    """Catches a suffix read from .gz instead of from the name before it, or in lower case only, and task.sep being
    ignored."""
    for name in ("a.csv.gz", "B.CSV.GZ"):
        path = write(tmp_path / name, gzip.compress(b"label;text\nx;one, two\n"))
        assert values(read_table(path, COLUMNS, FileFormat(csv=CsvFormat(separator=";")))) == [
            {"label": "x", "text": "one, two"}
        ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text\none\ntwo\n"),
        ("a.csv", "text,label\none,\ntwo, \n"),
        ("a.jsonl", '{"text": "one", "label": null}\n{"text": "two"}\n'),
        ("a.jsonl", '{"text": "one", "label": -1}\n{"text": "two", "label": -1}\n'),
    ],
)
def test_a_split_without_labels_may_be_allowed(tmp_path: Path, name: str, text: str) -> None:
    """Catches an unlabelled test split being rejected, or taken for one with the label ''."""
    path = write(tmp_path / name, text)
    table = read_table(path, COLUMNS, targets_required=False)
    assert not table.labelled
    assert values(table) == [{"text": "one"}, {"text": "two"}]
    if "-1" not in text:
        with pytest.raises(UserError, match="label"):
            read_table(path, COLUMNS, targets_required=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "sentence,label\na,1\n",
            r"a\.csv:1: no column 'text'; found: sentence, label \(task\.columns\.text names",
        ),
        ("a.csv", "text,text,label\na,b,1\n", r"a\.csv:1: 2 columns are called 'text' \(task\.columns\.text names"),
        ("a.csv", "text,label\na,1\n\nb\n", r"a\.csv:4: expected 2 columns, found 1"),
        ("a.csv", "text,label\na,1\nb,\n", r"a\.csv:3: the label is empty"),
        ("a.csv", "text,label\na,\nb,1\nc,\n", r"a\.csv:2 \(and 1 more line\): the label is empty"),
        ("a.csv", b"text,label\na,1\n\xff,1\n", r"a\.csv:3: not UTF-8 text \(byte 0xff at column 1\)"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), r"a\.csv: UTF-16 text; convert the file first"),
        ("a.csv", "", r"a\.csv has no rows"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.xlsx", "text,label\n", r"a\.xlsx: expected a file that ends in"),
        ("a.csv.gz", b"text,label\n", r"cannot read .*a\.csv\.gz"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": ',
            r"a\.jsonl:2: expected one JSON object per line: Expecting value",
        ),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected one JSON object per line, found \[1\]"),
        (
            "a.jsonl",
            '{"label": 1, "sentence": "a"}\n',
            r"a\.jsonl:1: no column 'text'; found: label, sentence \(task\.columns\.text",
        ),
        ("a.jsonl", '{"text": 5, "label": 1}\n', r"a\.jsonl:1: expected text in 'text', found 5"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', r"a\.jsonl:1: expected a label in 'label', found \[1\]"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"a\.jsonl:1: the label is empty"),
    ],
)
def test_bad_files_are_rejected_with_file_and_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    """Catches a bad row that is silently skipped or repaired, and a message without file and line."""
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / name, text), COLUMNS)


def test_a_test_split_has_all_labels_or_none(tmp_path: Path) -> None:
    """Catches rows without a label among those that are scored."""
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,\n")
    with pytest.raises(UserError, match=r"a\.csv:3: the label is empty"):
        read_table(path, COLUMNS, targets_required=False)
    assert values(read_table(write(path, "text,label\na,\n"), COLUMNS, targets_required=False)) == [{"text": "a"}]


@pytest.mark.parametrize("required", [True, False])
def test_rows_without_a_label_are_left_out(tmp_path: Path, required: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Catches SNLI being rejected for pairs that annotators did not agree on, rows that vanish silently, and numbers of
    rows that do not count them."""
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b", "c", "d"], "label": [-1, 0, 1, -1]}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": FEATURES}})}
        ),
        tmp_path / "train.parquet",
    )
    path = Path(f"hub:{tmp_path}:train")
    table = read_table(path, COLUMNS, targets_required=required)
    assert values(table) == [{"label": "no", "text": "b"}, {"label": "yes", "text": "c"}]
    assert [record.row for record in table.records] == [2, 3]
    assert caplog.messages == [f"{path}: left out 2 rows without a label (null or -1), such as {path}:1"]


NLI = ["entailment", "neutral", "contradiction"] * 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_dash_in_a_few_rows_is_no_label(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a class of the pairs that annotators did not agree on, in the original files of SNLI, OCNLI and CMNLI."""
    labels = ["-", *NLI]
    rows = [json.dumps({"text": "a", "label": label}) if name == "a.jsonl" else f"a\t{label}" for label in labels]
    path = write(tmp_path / name, "\n".join(rows if name == "a.jsonl" else ["text\tlabel", *rows]))
    table = read_table(path, COLUMNS)
    assert [row["label"] for row in values(table)] == NLI
    assert caplog.messages == [
        f"{path}: left out 1 row without a label (null, -1 or -), such as {path}:{1 + (name == 'a.txt')}; if - is a "
        "label, list it in task.labels"
    ]
    assert [row["label"] for row in values(read_table(path, COLUMNS, known=("-", "entailment")))] == labels


def test_rows_without_a_label_count_like_bad_lines(tmp_path: Path) -> None:
    """Catches predictions with other numbers of rows than the file has, if both kinds of rows are left out."""
    rows = ["text\tlabel", "a\tb\tx", "a\t-", *(f"a\t{label}" for label in NLI)]
    path = write(tmp_path / "a.tsv", "\n".join(rows))
    skipping = FileFormat(csv=CsvFormat(on_bad_lines="skip"))
    assert [record.row for record in read_table(path, COLUMNS, skipping).records] == [*range(3, 3 + len(NLI))]


@pytest.mark.parametrize(
    "labels", [["+", "-"], ["+", "-", *["0"] * 9], ["-", *["x"] * 9], ["-", "-", *NLI], ["-", "-"]], ids="".join
)
def test_a_dash_may_be_a_label(tmp_path: Path, labels: list[str]) -> None:
    """Catches sentiment + and - that loses half of its rows, and a class that is as frequent as others."""
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    assert [row["label"] for row in values(read_table(path, COLUMNS))] == labels


def test_minus_one_may_be_a_label(tmp_path: Path) -> None:
    """Catches sentiment labels -1, 0 and 1 that are taken for missing ones."""
    path = write(tmp_path / "a.csv", "text,label\na,-1\nb,1\n")
    assert read_table(path, COLUMNS, targets_required=False).labelled
    path = write(tmp_path / "a.csv", "text,label\na,-1\n")
    assert read_table(path, COLUMNS, targets_required=True).labelled


class ChoiceColumns(Columns):
    label: LabelColumn = "label"
    choices: TextsColumn = "choices"


def test_a_list_of_texts_is_one_column_or_several(tmp_path: Path) -> None:
    """Catches choices in several columns of a CSV file that are not read in the order of the config."""
    several = ChoiceColumns(choices=("end1", "end0"))
    path = write(tmp_path / "a.csv", "end0,end1,label\na,b,1\n")
    assert values(read_table(path, several)) == [{"label": "1", "choices": ["b", "a"]}]
    path = write(tmp_path / "b.csv", 'choices,label\n"[""b"", ""a""]",1\n')
    assert values(read_table(path, ChoiceColumns())) == [{"label": "1", "choices": ["b", "a"]}]
    path = write(tmp_path / "a.jsonl", '{"choices": ["b", "a"], "label": 1}\n')
    assert values(read_table(path, ChoiceColumns())) == [{"label": "1", "choices": ["b", "a"]}]


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "end0,label\na,1\n", ChoiceColumns(choices=("end0", "end1")), r"a\.csv:1: no column 'end1'"),
        ("a.csv", "choices,label\na,1\n", ChoiceColumns(), r"a list of texts in 'choices', found \"a\"; for texts in"),
        ("a.csv", "choices,label\na,1\n", ChoiceColumns(), r"list their names; in one cell, write a JSON list"),
        (
            "a.csv",
            "choices,label\n['a'],1\n",
            ChoiceColumns(),
            r"not JSON, where texts are in double quotes: Expecting",
        ),
        ("a.jsonl", '{"choices": ["a", 1], "label": 1}', ChoiceColumns(), r"a list of texts in 'choices', found \["),
        ("a.jsonl", '{"a": "a", "b": 5, "label": 1}', ChoiceColumns(choices=("a", "b")), r"in 'a, b', found \["),
    ],
)
def test_a_bad_list_of_texts_is_rejected(tmp_path: Path, name: str, text: str, columns: Columns, message: str) -> None:
    """Catches a text that is taken apart into letters, and a message that does not name the columns."""
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / name, text), columns)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "id, label ,text\n1,x,one\n"), ("a.jsonl", '{" label ": "x", "text": "one"}\n')]
)
def test_spaces_around_a_column_name_do_not_count(tmp_path: Path, name: str, text: str) -> None:
    """Catches "no column 'label'; found:  label ", where the difference cannot be seen."""
    path = write(tmp_path / name, text)
    assert values(read_table(path, COLUMNS)) == [{"label": "x", "text": "one"}]
    assert values(read_table(path, ClassificationColumns(label=" label ", text="text"))) == [
        {"label": "x", "text": "one"}
    ]


@pytest.mark.parametrize("name", ["text", " text"])
def test_a_target_is_not_an_input(tmp_path: Path, name: str) -> None:
    """Catches a model that is shown the label: it scores 100 %, and has learned nothing."""
    path = write(tmp_path / "a.csv", "text,label\na,1\n")
    columns = ClassificationColumns(label=name, text="label", text_pair="text")
    message = r"a\.csv:1: task\.columns\.label and task\.columns\.text_pair are the same column, 'text'"
    with pytest.raises(UserError, match=message):
        read_table(path, columns)
    several = ChoiceColumns(choices=("text", "label"))
    with pytest.raises(UserError, match=r"columns\.label and task\.columns\.choices are the same column, 'label'"):
        read_table(path, several)
    assert values(read_table(path, several.without_targets())) == [{"choices": ["a", "1"]}]


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback for a missing file."""
    with pytest.raises(UserError, match=r"cannot read .*none\.csv"):
        read_table(tmp_path / "none.csv", COLUMNS)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (ChoiceColumns(), '{"choices": ["a", "\\ud800"], "label": 1}'),
        (
            QuestionAnsweringColumns(),
            '{"question": "a", "context": "b", "answers": {"text": ["\\udc00"], "answer_start": [0]}}',
        ),
    ],
)
def test_half_a_surrogate_pair_is_rejected_at_any_depth(tmp_path: Path, columns: Columns, row: str) -> None:
    """Catches a check that looks at cells of text only."""
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected Unicode text in '(choices|answers)'"):
        read_table(write(tmp_path / "a.jsonl", row), columns)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    """Catches an emoji in escaped JSON that is rejected."""
    path = write(tmp_path / "a.jsonl", '{"label": "x", "text": "\\ud83d\\ude00"}\n')
    assert values(read_table(path, COLUMNS)) == [{"label": "x", "text": "\U0001f600"}]


def test_half_a_surrogate_pair_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback of the tokenizer, or of the file that a label is written to after training."""
    path = write(tmp_path / "a.jsonl", '{"label": "x", "text": "a"}\n{"label": "\\ud800", "text": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: expected Unicode text in 'label', found half of a surrogate"):
        read_table(path, COLUMNS)


def test_a_number_beyond_floats_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback for a whole number in JSON that no float can hold."""
    path = write(tmp_path / "a.jsonl", f'{{"label": 1{"0" * 400}, "text": "a"}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected a number in 'label'"):
        read_table(path, RegressionColumns(text="text"))


@pytest.mark.parametrize("number", ["1e300", "-1e19"])
def test_a_number_whose_square_overflows_is_rejected(tmp_path: Path, number: str) -> None:
    """Catches an infinite loss that is blamed on the learning rate."""
    path = write(tmp_path / "a.csv", f"text,label\na,{number}\n")
    with pytest.raises(UserError, match=r"a\.csv:2: expected a number in 'label', found .*; numbers beyond 1e\+18"):
        read_table(path, RegressionColumns(text="text"))


@pytest.mark.parametrize(("text", "start"), [("e", "true"), ("e", "1.5"), ("", "0")])
def test_an_answer_has_a_text_and_a_start(tmp_path: Path, text: str, start: str) -> None:
    """Catches a start that is no number, and an answer without characters."""
    answers = f'{{"text": ["{text}"], "answer_start": [{start}]}}'
    path = write(tmp_path / "a.jsonl", f'{{"question": "a", "context": "d e", "answers": {answers}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected answers"):
        read_table(path, QuestionAnsweringColumns())


def test_an_empty_cell_is_a_sentence_without_words(tmp_path: Path) -> None:
    """Catches a traceback for an empty sentence in a CSV file."""
    path = write(tmp_path / "a.csv", 'tokens\na b\n""\n')
    assert values(read_table(path, TokenColumns(), targets_required=False)) == [{"words": ["a", "b"]}, {"words": []}]


def test_a_sentence_of_a_reference_is_no_list(tmp_path: Path) -> None:
    """Catches a file that is rejected because one of its sentences is a list of numbers in JSON."""
    path = write(tmp_path / "a.csv", 'tokens\na b\n[ 3 ]\n"[1, 2.5]"\n"[""a"", ""b""]"\n')
    found = values(read_table(path, TokenColumns(), targets_required=False))
    assert [row["words"] for row in found] == [["a", "b"], ["[", "3", "]"], ["[1,", "2.5]"], ["a", "b"]]
    for name, text in (("b.csv", 'tokens\n"[""a"", 3]"\n'), ("c.jsonl", '{"tokens": [3]}\n')):
        with pytest.raises(UserError, match="expected a list of words, or words separated by spaces in 'tokens'"):
            read_table(write(tmp_path / name, text), TokenColumns(), targets_required=False)


def test_a_line_per_word_is_no_csv_file(tmp_path: Path) -> None:
    """Catches a model that is trained on sentences of one character, which the messages on the way advise."""
    lines = "我\tO\n来\tO\n\n北\tB-LOC\n京\tI-LOC\n\n" * 5
    path, config_format = write(tmp_path / "a.txt", lines), CsvFormat(as_flags=False)
    conll = r"for a word and its tags per line, set task\.format: conll"
    with pytest.raises(UserError, match=rf"no column 'tokens'; found: 我, O \(.*\); {conll}; if the first row is data"):
        read_table(path, TokenColumns(), FileFormat(csv=config_format))
    by_number = TokenColumns(words="0", tags="1")
    message = rf"a\.txt: 20 of 20 rows have one word, expected a sentence per row; {conll}$"
    with pytest.raises(UserError, match=message):
        read_table(path, by_number, FileFormat(csv=replace(config_format, header=False)))
    assert len(read_table(path, by_number, FileFormat("conll"))) == 10
    path = write(tmp_path / "b.csv", "tokens,tags\n" + "a b,O O\n" * 3 + "yes,O\n" * 17)
    assert len(read_table(path, TokenColumns())) == 20
    with pytest.raises(UserError, match=rf"a\.bmes: expected a file .*; {conll}$"):
        read_table(tmp_path / "a.bmes", TokenColumns(), FileFormat(csv=config_format))


def test_a_chinese_sentence_is_not_one_word(tmp_path: Path) -> None:
    """Catches a file of plain sentences, each of which gets one tag."""
    path = write(tmp_path / "a.csv", "tokens\n李 婷 好 。\n好\n李婷来了，好。\n")
    with pytest.raises(UserError, match=r"a\.csv:4: .* in 'tokens', found \"李婷来了，好。\"; in Chinese, put spaces"):
        read_table(path, TokenColumns(), targets_required=False)
    path = write(tmp_path / "b.jsonl", '{"tokens": "李 婷 好 。"}\n{"tokens": "好"}\n{"tokens": ["好。"]}\n')
    found = values(read_table(path, TokenColumns(), targets_required=False))
    assert [row["words"] for row in found] == [["李", "婷", "好", "。"], ["好"], ["好。"]]
    path = write(tmp_path / "c.jsonl", json.dumps({"tokens": "我爱北京天安门"}))
    with pytest.raises(UserError, match=r"c\.jsonl:1: .*; in Chinese, put spaces between the words"):
        read_table(path, TokenColumns(), targets_required=False)
    long = "我们明天去北京的天安门广场看升旗， 然后再到故宫博物院里面参观一整天。"
    for row in (long, "今天下雨。", "今天，下雨。 我们，走吧。", "李婷来了，好。 2024年3月1日，晴。 再见"):
        path = write(tmp_path / "c.jsonl", json.dumps({"tokens": row}))
        with pytest.raises(UserError, match=r"c\.jsonl:1: .*; in Chinese, put spaces between the words"):
            read_table(path, TokenColumns(), targets_required=False)
    names = ["全国人民代表大会 常务委员会", "中国人民解放军总医院 成立", "只可意会，不可言传 的 、 三、四 年 。"]
    names += ["中华人民共和国 全国人民代表大会", "王小明、 李雷、 韩梅梅", "好。 谢谢。 再见……"]
    path = write(tmp_path / "d.jsonl", "\n".join(json.dumps({"tokens": row}) for row in names))
    assert len(read_table(path, TokenColumns(), targets_required=False)) == len(names)
    rows = ["iPhone 在 北京 举行 发布会", "中国人民解放军总医院 成立 了", ["我爱北京天安门"], '["我爱北京天安门"]']
    path = write(tmp_path / "d.jsonl", "\n".join(json.dumps({"tokens": row}) for row in rows))
    found = values(read_table(path, TokenColumns(), targets_required=False))
    assert [len(row["words"]) for row in found] == [5, 3, 1, 1]
