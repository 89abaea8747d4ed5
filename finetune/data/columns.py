"""Types of the columns of a task: the content of their cells, and how a cell is read.

A kind of task declares its columns as the fields of a `Columns` section, each of one of the types below. The name of a
field is the role that its column plays. Reading, messages and docs/config.md follow from the declaration.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

from pydantic import BeforeValidator, Field

from experiment.config import Section
from experiment.files import parse_json
from experiment.unspaced_scripts import HAN

_LARGEST = 1e18  # of the numbers to predict
FLAGS = {"1": "1", "1.0": "1", "true": "1", "0": "0", "0.0": "0", "false": "0"}
_HAN = re.compile(f"[{HAN}]")
_HAN_IN_WORD = 4  # at most, in text of one word
_HAN_IN_WORDS = 12  # at most, in half of the words of other text
_PUNCTUATION = "，。！？；：、…"
_LIST = re.compile(r"\[[^][]*[\s,][^][]*\]")  # unlike [other], or tags from [CLS] to [SEP]
_CHINESE_SENTENCE = re.compile(f"[{HAN}][{_PUNCTUATION}]")


@dataclass(frozen=True, eq=False)  # types that hold the same, such as TEXT and CONTEXT, are different types
class CellType:
    """The content of the cells of a column."""

    description: str  # as in "expected …"
    read: Callable[[object], Any]
    """The value of a cell, None if it is empty. Raises ValueError if it holds something else, perhaps with a hint."""
    target: bool = False  # to be predicted: a test split may lack it
    encoded: bool = False  # a target that the model reads too, such as the other text of a pair to embed
    optional: bool = False  # a target that any split may lack, and rows too if it is encoded
    is_hidden: Callable[[Any], bool] = lambda value: value in ("-1", -1.0)
    """Whether a value stands for no target, as an empty cell does, if all rows of a test split have such a value."""

    @property
    def read_by_model(self) -> bool:
        return not self.target or self.encoded


def _read_text(cell: object) -> str:
    if isinstance(cell, str):
        return cell
    raise ValueError


def _read_label(cell: object) -> str | None:
    """Read an id, or a fraction, which needs `task.labels` as in CSV files."""
    is_fraction = isinstance(cell, float) and math.isfinite(cell) and not cell.is_integer()
    return repr(cell) if is_fraction else _read_id(cell)


def _read_id(cell: object) -> str | None:
    """Text, stripped; in JSON and Parquet also true, false, null for none, or a whole number, which pandas stores as a
    float beside empty cells."""
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if cell is None or isinstance(cell, int):
        return None if cell is None else json.dumps(cell)
    raise ValueError


def _read_group(cell: object) -> str | None:
    """Read text that is the same for the same cell, or the same cells of several columns; None if all are empty."""
    if not isinstance(cell, list | tuple):
        return _read_id(cell)
    ids = [_read_id(part) for part in cell]
    return json.dumps(ids, ensure_ascii=False) if any(ids) else None


def _read_texts(cell: object) -> list[str]:
    """Read a list of texts, or a tuple of the cells of several columns, in which null is an empty text."""
    cell = ["" if text is None else text for text in cell] if isinstance(cell, tuple) else _parse_json(cell)
    if isinstance(cell, list) and all(isinstance(text, str) for text in cell):
        return cell
    raise ValueError(
        ""
        if isinstance(cell, list)
        else "; for texts in several columns, list their names; in one cell, write a JSON list"
    )


def _read_choices(cell: object) -> list[str] | dict[str, str]:
    """Read texts, or texts by name if the row names them: in ARC, some rows have A to D and others 1 to 4. Rows with
    fewer choices than columns have empty cells at the end, which are left out."""
    match _parse_json(cell):  # as ARC and CommonsenseQA are on the Hugging Face Hub
        case {"text": [*texts], "label": [*names]} if len(texts) == len(names):
            named = dict(zip((_read_id(name) or "" for name in names), _read_texts(texts), strict=True))
            if len(named) < len(texts):
                raise ValueError("; two choices have the same name")
            return named
    texts = _read_texts(cell)
    if not isinstance(cell, tuple):
        return texts
    while texts and not texts[-1].strip():
        del texts[-1]
    if not all(text.strip() for text in texts):
        raise ValueError("; a choice before the last one is empty")
    return texts


def _read_negatives(cell: object) -> list[str]:
    """Read a list of texts, without empty ones; text that is not a list in JSON is one of them."""
    cell = _parse_json(cell)
    return [text for text in _read_texts([cell] if isinstance(cell, str) else cell or []) if text]


def _read_number(cell: object) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise ValueError
    number = as_number(cell)
    if number is None or not math.isfinite(number):
        raise ValueError
    if abs(number) > _LARGEST:
        raise ValueError(f"; numbers beyond {_LARGEST:g} have no squared error in fp32")
    return number


def as_number(cell: str | float) -> float | None:
    """Return the number that a cell holds; None if it holds something else."""
    try:
        return float(cell)
    except (ValueError, OverflowError):  # a whole number that is too large
        return None


def _read_labels(cell: object) -> list[str] | str | None:
    """Read a list of labels, without empty ones; text that is not a list in JSON stays text.

    No labels are an empty list, not an empty cell. Of a tuple of cells, a multi-hot vector is returned;
    None if all are empty or -1.
    """
    if isinstance(cell, tuple):
        values = [_read_id(part) or "" for part in cell]
        if {"", "-1", "-1.0"}.issuperset(values):
            return None
        if not all(flags := [FLAGS.get(value.lower(), "") for value in values]):
            raise ValueError("; of several columns, each must have 1 or 0")
        return flags
    cell = _parse_list(cell)
    if isinstance(cell, str) or cell is None:
        return cell or []
    if isinstance(cell, list) and None not in cell:
        return [label for label in map(_read_id, cell) if label]
    raise ValueError


def _read_words(cell: object) -> list[str] | None:
    cell = _parse_json(cell)
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        return cell.split()
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return cell
    raise ValueError


def _read_tags(cell: object) -> list[str] | None:
    """Read a list of tags; None if it holds nothing but null or -1, as data sets without tags on the Hub."""
    cell = _parse_list(cell)
    if isinstance(cell, list) and cell and all(tag is None or isinstance(tag, int | float) for tag in cell):
        if all(tag in (None, -1) for tag in cell):
            return None
        raise ValueError("; class numbers have names only in Parquet files of `datasets`: read them as hub:FOLDER")
    if (tags := _read_words(cell)) and not all(tags):
        raise ValueError("; a tag is empty")
    return tags


def _read_sentence(cell: object) -> list[str]:
    found = _parse_json(cell)
    numbers = isinstance(found, list) and all(isinstance(each, int | float) for each in found)
    if isinstance(cell, str) and found and numbers:
        return cell.split()  # such as [ 3 ], a reference
    words = _read_words(cell) or []  # an empty cell is a sentence without words
    if isinstance(found, str) and _lacks_spaces(words):
        raise ValueError("; in Chinese, put spaces between the words, or between the characters as in training")
    return words


def _lacks_spaces(words: list[str]) -> bool:
    """Return whether the only word of a text, or most of its words, look like clauses or sentences in Chinese."""
    most = _HAN_IN_WORD if len(words) == 1 else _HAN_IN_WORDS
    if len(words) > 1:
        words = [word.rstrip(_PUNCTUATION) for word in words]  # 王小明、 李雷 and 好。 谢谢。 are words
    clauses = sum(_CHINESE_SENTENCE.search(word) is not None or len(_HAN.findall(word)) > most for word in words)
    return 2 * clauses > len(words)


def _read_answers(cell: object) -> list[dict[str, Any]] | None:
    """Read dicts with `text` and `start`, the character at which the answer starts, negative if that is not known; []
    if there is no answer."""
    cell = _parse_json(cell)
    if cell is None or cell == "":
        return None
    if isinstance(cell, dict):  # of lists, as the library `datasets` has them
        texts, starts = cell.get("text"), cell.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError
        cell = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(cell, list) and all(map(_is_answer, cell)):
        return [{"text": answer["text"], "start": answer["answer_start"]} for answer in cell if answer["text"]]
    raise ValueError


def _read_options(cell: object) -> list[list[str]]:
    cell = _parse_json(cell)
    if not isinstance(cell, list) or not all(isinstance(row, list) and len(row) > 1 for row in cell):
        raise ValueError
    if not all(isinstance(option, str) and option.strip() for row in cell for option in row):
        raise ValueError
    return cell


def _is_answer(value: Any) -> bool:
    text, start = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    return isinstance(text, str) and type(start) is int and (bool(text) or start < 0)


def _parse_json(cell: object) -> object:
    """Return the list or object that a text is in JSON; any other cell as it is.

    Raises ValueError for text that is nearly JSON: pandas writes lists to CSV files as Python prints them.
    """
    if isinstance(cell, str) and cell.startswith(("[", "{")):
        try:
            return parse_json(cell)
        except ValueError as error:
            if cell.startswith(("['", '["', "[[", "{'", '{"')) and cell.endswith(("]", "}")):
                raise ValueError(f"; not JSON, where texts are in double quotes: {error}") from None
    return cell


def _parse_list(cell: object) -> object:
    """Parse a cell as above, but reject other lists in brackets: arrays of numpy are written as [0 1]."""
    cell = _parse_json(cell)
    if isinstance(cell, str) and _LIST.fullmatch(cell):
        raise ValueError('; not JSON: write a list as ["a", "b"], numbers as [0, 1]')
    return cell


TEXT = CellType("text", _read_text)
CONTEXT = CellType("text", _read_text)  # that several rows may be about
LABEL = CellType("a label", _read_label, target=True)
WORDS = CellType("a list of words, or words separated by spaces", _read_sentence)


def _number_as_text(value: Any) -> Any:
    """Return a number as text: labels and column names are text, even if YAML reads them as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_number_as_text, json_schema_input_type=str | int), Field(min_length=1)]

TextColumn = Annotated[Name, TEXT]
ContextColumn = Annotated[Name, CONTEXT]  # a random validation split keeps the rows on one context together
LabelColumn = Annotated[Name, LABEL]  # a random validation split has about as much of each label as the rest
IdColumn = Annotated[Name, CellType("text or a whole number", _read_id)]
OrderColumn = Annotated[Name, CellType("a number", _read_number)]
GroupColumn = Annotated[Name | tuple[Name, ...], CellType("text or a whole number", _read_group)]
TextsColumn = Annotated[Name | tuple[Name, ...], CellType("a list of texts", _read_texts)]  # or one column for each
ChoicesColumn = Annotated[Name | tuple[Name, ...], CellType("a list of texts", _read_choices)]
WordsColumn = Annotated[Name, WORDS]
ChoiceColumn = Annotated[Name, CellType("the right choice", _read_label, target=True)]
LabelsColumn = Annotated[Name | tuple[Name, ...], CellType("a list of labels, or text", _read_labels, target=True)]
NumberColumn = Annotated[Name, CellType("a number", _read_number, target=True)]
PairedColumn = Annotated[Name, CellType("text", _read_text, target=True, encoded=True)]
NegativesColumn = Annotated[
    Name | tuple[Name, ...],
    CellType("a text, or a list of texts", _read_negatives, target=True, encoded=True, optional=True),
]
ScoreColumn = Annotated[Name, CellType("a number", _read_number, target=True, optional=True)]
TagsColumn = Annotated[
    Name,
    CellType("a list of tags, or tags separated by spaces", _read_tags, target=True, is_hidden={"-1"}.issuperset),
]
OptionsColumn = Annotated[Name, CellType("a list with two or more options for each blank", _read_options)]
ClozeAnswersColumn = Annotated[Name, CellType("a list of letters, one for each blank", _read_words, target=True)]
AnswersColumn = Annotated[
    Name,
    CellType(
        'answers {"text": […], "answer_start": […]} as in SQuAD',
        _read_answers,
        target=True,
        is_hidden=lambda answers: all(answer["start"] < 0 for answer in answers),
    ),
]


class Columns(Section):
    """Names of the columns, or their numbers from 0: in CSV files, always if `task.header` is null."""

    def names(self, role: str) -> tuple[str, ...]:
        """Return the columns that hold a role: usually one, none if it is not given."""
        names = getattr(self, role)
        return () if names is None else names if isinstance(names, tuple) else (names,)

    def cell_types(self) -> dict[str, CellType]:
        """Role -> type of its cells, for the columns that are given."""
        return {
            role: cell_type
            for role, field in type(self).model_fields.items()
            if getattr(self, role) is not None
            for cell_type in _cell_types([*field.metadata, field.annotation])
        }

    def roles(self, *cell_types: CellType) -> list[str]:
        """Return the roles of those given columns that have one of these types."""
        return [role for role, found in self.cell_types().items() if found in cell_types]

    def target_roles(self) -> list[str]:
        """Return the roles of those given columns that are to be predicted."""
        return [role for role, cell_type in self.cell_types().items() if cell_type.target]

    def without_targets(self) -> Self:
        """Return only the columns that a prediction needs."""
        return self.model_copy(update=dict.fromkeys(self.target_roles()))


class TextColumns(Columns):
    """Columns with a text, or with a pair of texts."""

    text: TextColumn = "sentence1"
    """Column with the text."""

    text_pair: TextColumn | None = None
    """Column with the second text, for tasks on pairs."""

    @staticmethod
    def texts(values: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return the text of a record, and the second one of a pair."""
        return values["text"], values.get("text_pair")


def _cell_types(parts: Any) -> list[CellType]:
    """Return the cell types in the metadata and the annotation of a field."""
    found = [part for part in parts if isinstance(part, CellType)]
    return found or [cell_type for part in parts for cell_type in _cell_types(get_args(part))]
