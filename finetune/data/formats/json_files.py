"""JSON: an object per line, a list of objects, one object, and the nested lists of DREAM, C3 and SQuAD."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiment.csv_and_jsonl import read_json_lines
from experiment.errors import UserError
from experiment.strict_json import parse_json
from finetune.data.formats.row import Row, open_lines

_EXPECTED = "expected a list of objects, one object, one object per line, or the lists of DREAM or SQuAD"


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a file with one object per line."""
    with open_lines(path) as lines:
        yield from _rows_of_lines(lines, path)


def read_json_folder(folder: Path) -> Iterator[Row]:
    """The rows of all .json files in a folder and below it, by file name, as CLOTH (Xie et al. 2018) comes."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise UserError(f"{folder}: a folder without .json files")
    for path in files:
        yield from read_json(path)


def read_json(path: Path) -> Iterator[Row]:
    """The rows of a .json file: its objects, or its questions if they are nested.

    DREAM (Sun et al. 2019) and C3 (Sun et al. 2020) give `context` (the lines of the dialogue, joined by line breaks),
    `question`, `choices`, `answer` and `id`; SQuAD (Rajpurkar et al. 2016) `title`, `context`, `question`, `answers`
    (`text` and `answer_start`, a list each; None in a test split that lacks them) and `id`.
    """
    with open_lines(path) as file:
        lines = list(file)
    try:
        document = parse_json("".join(lines))
    except ValueError as error:
        if len(lines) > 1 and _is_object(lines[0]):
            yield from _rows_of_lines(lines, path)
            return
        raise UserError(f"{path}: invalid JSON: {error}") from None
    if isinstance(document, dict) and "data" not in document:
        yield _row(str(path), document)
        return
    for number, cells in enumerate(_objects(path, document), 1):
        yield _row(f"{path}, row {number}", cells)


def _rows_of_lines(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for line, cells in read_json_lines(lines, str(path)):
        yield _row(f"{path}:{line}", cells)


def _row(place: str, cells: Mapping[str, object]) -> Row:
    return Row(place, list(cells), list(cells.values()), place)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _objects(path: Path, document: Any) -> Iterator[Mapping[str, object]]:
    items = document["data"] if isinstance(document, dict) else document
    if not isinstance(items, list):
        raise UserError(f"{path}: {_EXPECTED}, found {str(items)[:60]}")
    for number, item in enumerate(items, 1):
        try:
            match item:
                case {"paragraphs": paragraphs}:
                    yield from _squad_questions(item.get("title"), paragraphs)
                case dict():
                    yield item
                case [[*_] as lines, [*questions], identity]:
                    yield from _dream_questions(lines, questions, identity)
                case _:
                    raise TypeError
        except (KeyError, TypeError):
            raise UserError(f"{path}, item {number}: {_EXPECTED}, found {str(item)[:60]}") from None


def _dream_questions(lines: list[str], questions: list[Any], identity: object) -> Iterator[dict[str, object]]:
    for question in questions:
        yield {
            "context": "\n".join(lines),
            "question": question["question"],
            "choices": question["choice"],
            "answer": question.get("answer"),
            "id": identity,
        }


def _squad_questions(title: object, paragraphs: list[Any]) -> Iterator[dict[str, object]]:
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            answers = question.get("answers")
            yield {
                "title": title,
                "context": paragraph["context"],
                "question": question["question"],
                "answers": None if answers is None else _columns_of(answers),
                "id": question["id"],
            }


def _columns_of(answers: list[Any]) -> dict[str, list[object]]:
    return {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
