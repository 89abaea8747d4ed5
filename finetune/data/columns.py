"""Types of the columns of a task: what their cells hold, and how a cell is read.

A kind of task declares its columns as the fields of a `Columns` section, each of one of the types below. The name of a
field is the role that its column plays. Reading, messages and docs/config.md follow from the declaration.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

from pydantic import BeforeValidator, Field

from experiment.config import Section


@dataclass(frozen=True)
class CellType:
    """What the cells of a column hold."""

    description: str  # as in "expected …"
    read: Callable[[object], Any]
    """The value of a cell, None if it is empty. Raises ValueError if it holds something else, perhaps with a hint."""
    target: bool = False  # what is to be predicted: a test split may lack it


def _read_text(cell: object) -> str:
    if isinstance(cell, str):
        return cell
    raise ValueError


def _read_label(cell: object) -> str | None:
    """Text, stripped; in JSON also a whole number, true, false, or null for no label."""
    if isinstance(cell, str):
        return cell.strip() or None
    if cell is None or isinstance(cell, int):
        return None if cell is None else json.dumps(cell)
    raise ValueError("; for regression set task.kind: regression" if isinstance(cell, float) else "")


def _read_texts(cell: object) -> list[str]:
    if isinstance(cell, list) and all(isinstance(text, str) for text in cell):
        return cell
    raise ValueError("" if isinstance(cell, list) else "; for texts in several columns, list their names")


TEXT = CellType("text", _read_text)
TEXTS = CellType("a list of texts", _read_texts)
LABEL = CellType("a label", _read_label, target=True)


def _number_as_text(value: Any) -> Any:
    """Labels and column names are text, even if YAML reads `0` or `1` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1)]
TextColumn = Annotated[Name, TEXT]
TextsColumn = Annotated[Name | tuple[Name, ...], TEXTS]  # a column of lists, or one column for each text
LabelColumn = Annotated[Name, LABEL]


class Columns(Section):
    """Names of the columns, or their numbers from 0 if `task.header` is null."""

    def names(self, role: str) -> tuple[str, ...]:
        """The columns that hold a role: usually one, none if it is not given."""
        names = getattr(self, role)
        return () if names is None else names if isinstance(names, tuple) else (names,)

    def cell_types(self) -> dict[str, CellType]:
        """Role -> what its cells hold, of the columns that are given."""
        return {
            role: cell_type
            for role, field in type(self).model_fields.items()
            if getattr(self, role) is not None
            for cell_type in _cell_types([*field.metadata, field.annotation])
        }

    def without_targets(self) -> Self:
        """Only the columns that a prediction needs."""
        targets = [role for role, cell_type in self.cell_types().items() if cell_type.target]
        return self.model_copy(update=dict.fromkeys(targets))


def _cell_types(parts: Any) -> list[CellType]:
    """The cell types in the metadata and the annotation of a field."""
    found = [part for part in parts if isinstance(part, CellType)]
    return found or [cell_type for part in parts for cell_type in _cell_types(get_args(part))]
