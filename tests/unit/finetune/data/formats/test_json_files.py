import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from finetune.data.formats import FileFormat, read_rows
from finetune.data.records import read_table
from finetune.kinds.question_answering import QuestionAnsweringColumns

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
    """Catches CLOTH's files, one passage each in middle/ and high/, read in an order that the disk decides."""
    for name in ("middle/middle2", "high/high1", "middle/middle1"):
        write(tmp_path / f"{name}.json", {"article": name, "options": [["a", "b"]], "answers": ["A"]})
    (tmp_path / "README.md").write_text("not data")
    found = read(tmp_path)
    assert [cells["article"] for _, cells in found] == ["high/high1", "middle/middle1", "middle/middle2"]
    assert found[0][0] == str(tmp_path / "high" / "high1.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without \.json files"):
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
