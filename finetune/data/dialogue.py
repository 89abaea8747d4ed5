"""Texts with their context in a dialogue: the turns before them."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import PositiveInt, model_validator

from finetune.data.columns import Columns, IdColumn, TextsColumn


class DialogueContext(Columns):
    """Previous turns of a dialogue: the rows with the same `group`, or the texts in the columns `previous`."""

    group: IdColumn | None = None
    """Column that says which dialogue a row belongs to."""

    order: IdColumn | None = None
    """Column with the number of the turn in its dialogue; default: the order of the rows."""

    turns: PositiveInt = 3
    """Number of previous rows to put before a text, with `group`."""

    previous: TextsColumn | None = None
    """Columns with the previous turns, the oldest first, in place of `group`. Empty ones are skipped."""

    speaker: IdColumn | None = None
    """Column with the speaker, whose name is put before each turn; not before those of `previous`."""

    @model_validator(mode="after")
    def _turns_are_found_in_one_way(self) -> Self:
        if (self.group is None) == (self.previous is None):
            raise ValueError("expected either 'group' or 'previous'")
        if self.order is not None and self.group is None:
            raise ValueError("order: needs 'group'")
        return self


def join_turns(
    texts: Sequence[str], turns: Sequence[Mapping[str, Any]], context: DialogueContext, separator: str
) -> list[str]:
    """Each text with the turns before it. turns: the values of the columns of `context`, in the order of the texts.

    Raises ValueError with the position and the value of an order that is not a number.
    """
    spoken = [
        f"{turn['speaker']}: {text}" if turn.get("speaker") else text for text, turn in zip(texts, turns, strict=True)
    ]
    if context.previous is not None:
        before = [[text for text in turn["previous"] if text.strip()] for turn in turns]
    else:
        before = [[spoken[index] for index in indices] for indices in _previous(turns, context.turns)]
    return [f" {separator} ".join([*previous, text]) for previous, text in zip(before, spoken, strict=True)]


def _previous(turns: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Of each turn, the turns before it in its group. A turn without a group has none."""
    groups: dict[str, list[int]] = {}
    for index, turn in enumerate(turns):
        if turn["group"] is not None:
            groups.setdefault(turn["group"], []).append(index)
    found: list[list[int]] = [[] for _ in turns]
    for indices in groups.values():
        in_order = sorted(indices, key=lambda index: _order(index, turns[index]))
        for place, index in enumerate(in_order):
            found[index] = in_order[max(0, place - count) : place]
    return found


def _order(index: int, turn: Mapping[str, Any]) -> float:
    if "order" not in turn:
        return index
    try:
        return float(turn["order"])
    except (TypeError, ValueError):
        raise ValueError(index, turn["order"]) from None
