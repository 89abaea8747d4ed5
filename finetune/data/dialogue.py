"""Dialogues: the previous turns that are put before each text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import PositiveInt, model_validator

from experiment.csv_and_jsonl import unexpected_cell
from experiment.errors import UserError
from finetune.data.columns import Columns, GroupColumn, IdColumn, OrderColumn, TextsColumn


class DialogueContext(Columns):
    """Previous turns of a dialogue: the rows with the same `group`, or the texts in the columns `previous`."""

    group: GroupColumn | None = None
    """Column that says which dialogue a row belongs to. Several, if dialogues are numbered anew in each episode:
    `[Episode_ID, Scene_ID]`."""

    order: OrderColumn | None = None
    """Column with the number of the turn in its dialogue; default: the order of the rows."""

    turns: PositiveInt = 3
    """Number of previous rows to put before a text, with `group`."""

    previous: TextsColumn | None = None
    """Columns with the previous turns, the oldest first, in place of `group`. Empty ones are skipped."""

    speaker: IdColumn | None = None
    """Column with the speaker, whose name is put before each turn; not before the turns in `previous`."""

    @model_validator(mode="after")
    def _turns_are_found_in_one_way(self) -> Self:
        if (self.group is None) == (self.previous is None):
            raise ValueError("expected either 'group' or 'previous'")
        if self.order is not None and self.group is None:
            raise ValueError("order: needs 'group'")
        return self


@dataclass(frozen=True)
class TurnJoiner:
    """Puts the previous turns of its dialogue before each text.

    Without a separator of turns, `text` stays as it is, and `previous` has the turns that are columns.
    """

    context: DialogueContext
    separator: str | None

    def join(self, texts: Sequence[str], turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the values that change in each row. turns: the values of the columns of `context`, in text order."""
        if self.separator is None:
            return [{"previous": turn.get("previous", [])} for turn in turns]
        spoken = [
            f"{turn['speaker']}: {text}" if turn.get("speaker") else text
            for text, turn in zip(texts, turns, strict=True)
        ]
        if self.context.previous is not None:
            before = [[text for text in turn["previous"] if text.strip()] for turn in turns]
        else:
            before = [[spoken[index] for index in indices] for indices in _previous(turns, self.context.turns)]
        separator = f" {self.separator} "
        return [{"text": separator.join([*previous, text])} for previous, text in zip(before, spoken, strict=True)]

    def check_order(self, places: Sequence[str], turns: Sequence[Mapping[str, Any]], key: str) -> None:
        """Raise UserError for a turn of a dialogue without a number, and if a dialogue has two turns of the same
        number: they are two dialogues. places: of the turns. key: of `context`, in messages."""
        first: dict[tuple[str, float], str] = {}
        for place, turn in zip(places, turns, strict=True):
            if turn.get("group") is None or "order" not in turn:
                continue
            if turn["order"] is None:
                raise unexpected_cell(place, str(self.context.order), turn["order"], "a number")
            earlier = first.setdefault((turn["group"], turn["order"]), place)
            if earlier != place:
                raise UserError(
                    f"{place}: dialogue {turn['group']} has turn {turn['order']:.15g} twice, see {earlier}; if "
                    "dialogues are numbered anew in each part of the data, name all columns that identify one in "
                    f"{key}.group, such as [Episode_ID, Scene_ID]"
                )


def _previous(turns: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Return the turns before each turn in its group. A turn without a group has none."""
    groups: dict[str, list[int]] = {}
    for index, turn in enumerate(turns):
        if turn["group"] is not None:
            groups.setdefault(turn["group"], []).append(index)
    found: list[list[int]] = [[] for _ in turns]
    for indices in groups.values():
        in_order = sorted(indices, key=lambda index: turns[index].get("order", index))
        for place, index in enumerate(in_order):
            found[index] = in_order[max(0, place - count) : place]
    return found
