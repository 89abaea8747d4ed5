"""The splits of a task: read, or drawn from the training split."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiment.errors import UserError
from experiment.formatting import counted
from finetune.data.columns import CONTEXT, Columns
from finetune.data.dialogue import TurnJoiner
from finetune.data.records import Record, Table, read_table, target_texts
from finetune.data.task_config import TaskConfig


def read_splits(config: TaskConfig, joiner: TurnJoiner | None, fit_on: str = "train") -> dict[str, Table]:
    """Return the rows of each split; `validation` is drawn from `train` if it has no file.

    joiner: of the turns of a dialogue. fit_on: as in the training config; with "train+validation", `train` has the rows
    of both.

    Raises UserError with file and line.
    """
    tables: dict[str, Table] = {}
    known = set(config.labels or ())
    for split, path in config.files().items():
        if split != "train" or config.is_trained:
            required = split in ("train", "validation")
            tables[split] = read_table(Path(path), config.columns, config.file_format(), required, joiner, known)
            if split == "train":
                known |= target_texts(tables[split], config.columns)
    if fit_on == "train+validation" and "train" in tables:
        if validation := tables.pop("validation", None):
            tables["train"] = _joined(tables["train"], validation, config.columns)
    elif "train" in tables and "validation" not in tables:
        train, validation = split_off(tables.pop("train"), config)
        tables = {"train": train, "validation": validation, **tables}
    return tables


def _joined(train: Table, validation: Table, columns: Columns) -> Table:
    """Return the rows of both splits, with those of validation numbered after the last one of train. Raises UserError
    if only one has an optional target, such as scores of pairs."""
    for role, cell_type in columns.cell_types().items():
        found = [role in table.records[0].values for table in (train, validation)]
        if cell_type.optional and not cell_type.encoded and found[0] != found[1]:
            having, lacking = (train, validation) if found[0] else (validation, train)
            raise UserError(
                f"training.fit_on: train+validation: {having.path} has the column of task.columns.{role}, "
                f"{lacking.path} has not; add it, or set training.fit_on: train"
            )
    last = train.records[-1].row
    added = (replace(record, row=last + record.row) for record in validation.records)
    return replace(train, records=(*train.records, *added))


def split_off(table: Table, config: TaskConfig) -> tuple[Table, Table]:
    """Divide a table at random, but always in the same way, into the rest and `validation_share` of it.

    The share has about as much of each label as the table has; a row with several counts by the rarest one that occurs
    more than once. A row without such a label stays in the rest: the model could not know its label. Turns of a
    dialogue, and records with the same context (a column of type CONTEXT), such as the questions on a text, stay
    together. Raises UserError if the table is too small.
    """
    share, in_order = config.validation_share, related_records(table.records, config.columns)
    shuffled = [in_order[index] for index in np.random.default_rng(config.split_seed).permutation(len(in_order))]
    of_units = [set(config.labels_of(table.records[unit[0]].values)) or {""} for unit in shuffled]
    support = Counter(label for labels in of_units for label in labels)
    shared = [[(support[label], label) for label in labels if support[label] > 1] for labels in of_units]
    # One of every 1/share units, in the order of their labels.
    by_label = sorted((min(found)[1], place) for place, found in enumerate(shared) if found)
    taken = [place for number, (_, place) in enumerate(by_label) if int((number + 1) * share) > int(number * share)]
    if not taken:
        raise _too_small(table, config.columns, len(shuffled), len(shuffled) - len(by_label))
    indices = {index for place in taken for index in shuffled[place]}
    rest = [record for index, record in enumerate(table.records) if index not in indices]
    return _numbered_anew(table, rest), _numbered_anew(table, [table.records[index] for index in sorted(indices)])


def _numbered_anew(table: Table, records: Sequence[Record]) -> Table:
    return replace(table, records=tuple(replace(record, row=number) for number, record in enumerate(records, 1)))


def related_records(records: Sequence[Record], columns: Columns) -> list[list[int]]:
    """Return the numbers of records that belong together, in order: turns of a dialogue, and records with the same
    context (a column of type CONTEXT), such as the questions on a text. Any other record is alone, also one whose
    context is empty."""
    shared = columns.roles(CONTEXT)
    units: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        context = tuple(record.values[role] for role in shared)
        has_context = any(text.strip() for text in context)
        units.setdefault(record.group or (context if has_context else index), []).append(index)
    return list(units.values())


def _too_small(table: Table, columns: Columns, units: int, once: int) -> UserError:
    """Return the error. once: how many units have a label that occurs once."""
    named = " and ".join(f"task.columns.{role}" for role in columns.target_roles())
    if once > max(1, len(table) / 2):
        advice = f"{once:,} of its {len(table):,} rows have a label that no other row has: is {named} the column of the"
        return UserError(f"{table.path}: no validation split can be taken from it: {advice} labels?")
    few = "too few rows"
    if units < len(table):
        texts = columns.roles(CONTEXT)
        noun, key = ("text", f"columns.{texts[0]}") if texts else ("dialogue", "dialogue.group")
        few = f"only {counted(units, noun)} (task.{key}) for {counted(len(table), 'row')}, too few"
    advice = ", or raise task.validation_share" if units > 1 else ""
    return UserError(f"{table.path}: {few} to take a validation split from; set task.validation to a file{advice}")
