"""A validation split from the rows of the training split."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from experiment.errors import UserError
from finetune.data.columns import CONTEXT, LABEL, Columns
from finetune.data.records import Record, Table


def split_off(table: Table, columns: Columns, share: float, seed: int) -> tuple[Table, Table]:
    """Divide a table at random, but always in the same way, into the rest and a share (at most 0.5) of it.

    The share has about as much of each label (a column of type LABEL) as the table has. A label that occurs once stays
    in the rest, so that the share has no label that the rest lacks. Turns of a dialogue, and records with the same
    context (a column of type CONTEXT), such as the questions on a text, stay together. Raises UserError if the table is
    too small.
    """
    shared, labelled = columns.roles(CONTEXT), columns.roles(LABEL)
    units: dict[Hashable, list[int]] = {}
    for index, record in enumerate(table.records):
        units.setdefault(record.group or _values(record, shared) or index, []).append(index)
    in_order = list(units.values())
    shuffled = [in_order[index] for index in np.random.default_rng(seed).permutation(len(in_order))]
    labels = [_values(table.records[unit[0]], labelled) for unit in shuffled]
    counts = Counter(labels)
    # One of every 1/share units, in the order of their labels.
    by_label = sorted((label, place) for place, label in enumerate(labels) if counts[label] > 1)
    taken = [place for number, (_, place) in enumerate(by_label) if int((number + 1) * share) > int(number * share)]
    if not taken:
        raise _too_small(table, columns, len(labels) - len(by_label))
    indices = {index for place in taken for index in shuffled[place]}
    rest = tuple(record for index, record in enumerate(table.records) if index not in indices)
    return replace(table, records=rest), replace(
        table, records=tuple(table.records[index] for index in sorted(indices))
    )


def _too_small(table: Table, columns: Columns, once: int) -> UserError:
    """once: how many units have a label that occurs once."""
    named = " and ".join(f"task.columns.{role}" for role in columns.roles(LABEL))
    if once > len(table) / 2:
        advice = f"{once:,} of its {len(table):,} rows have a label that no other row has: is {named} the column of the"
        return UserError(f"{table.path}: no validation split can be taken from it: {advice} labels?")
    return UserError(
        f"{table.path}: too few rows to take a validation split from; set task.validation to a file, or raise "
        "task.validation_share"
    )


def _values(record: Record, roles: Sequence[str]) -> tuple[str, ...]:
    return tuple(record.values[role] for role in roles)
