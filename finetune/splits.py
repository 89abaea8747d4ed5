"""The splits of a task: read, or drawn from the training split; then encoded for one model."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.formatting import counted
from experiment.progress import track
from finetune.config import TrainingConfig
from finetune.data.columns import CONTEXT, Columns
from finetune.data.records import Record, Table, find_labels, read_table
from finetune.data.task_config import TaskConfig
from finetune.device import CPU, Device
from finetune.encoding.encoder import Encoder, load_task_tokenizer, turn_joiner
from finetune.encoding.examples import Example, Padding, Split
from finetune.model import ModelInputs, ModelSpec, read_model_inputs
from finetune.task_kind import LossOptions, TaskKind, find_kind

# Encoded together: more is no faster, and the encodings of whole texts, also of what is cut off, are in memory.
_RECORDS = 256
_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class PreparedTask:
    """A task, ready for training."""

    kind: TaskKind[Any]
    splits: Mapping[str, Split]  # "train", perhaps "validation", then the test splits
    padding: Padding
    label_weights: tuple[float, ...] | None = None  # of the loss
    label_smoothing: float = 0.0
    positions: int | None = None  # of the model, in tokens; None: no limit
    device: Device = CPU

    @property
    def loss_options(self) -> LossOptions:
        weights = (
            None if self.label_weights is None else torch.tensor(self.label_weights, device=self.device.torch_device)
        )
        return LossOptions(weights, self.label_smoothing)

    def is_better(self, scores: Mapping[str, float], others: Mapping[str, float]) -> bool:
        """Return whether scores are better than others, by the task's metric."""
        metric = self.kind.config.metric
        score, other = scores[metric], others[metric]
        return score < other if metric in self.kind.lower_is_better else score > other


def read_splits(config: TaskConfig, model: Path, fit_on: str = "train") -> dict[str, Table]:
    """Return the rows of each split; `validation` is drawn from `train` if it has no file.

    model: the folder whose tokenizer has the separator of the turns of a dialogue. fit_on: as in the training config;
    with "train+validation", the former has the rows of both.

    Raises UserError with file and line.
    """
    joiner = turn_joiner(model, config)
    tables: dict[str, Table] = {}
    known = set(config.labels or ())
    for split, path in config.files().items():
        if split != "train" or config.is_trained:
            required = split in ("train", "validation")
            tables[split] = read_table(Path(path), config.columns, config.file_format(), required, joiner, known)
            if split == "train":
                known |= find_labels(tables[split], config.columns)
    if fit_on == "train+validation" and "train" in tables:
        if validation := tables.pop("validation", None):
            tables["train"] = _joined(tables["train"], validation, config.columns)
    elif "train" in tables and "validation" not in tables:
        train, validation = split_off(tables.pop("train"), config)
        tables = {"train": train, "validation": validation, **tables}
    return tables


def _joined(train: Table, validation: Table, columns: Columns) -> Table:
    """Return the rows of both splits. Raises UserError if only one has an optional target, such as scores of pairs."""
    for role, cell_type in columns.cell_types().items():
        found = [role in table.records[0].values for table in (train, validation)]
        if cell_type.optional and not cell_type.encoded and found[0] != found[1]:
            having, lacking = (train, validation) if found[0] else (validation, train)
            raise UserError(
                f"training.fit_on: train+validation: {having.path} has the column of task.columns.{role}, "
                f"{lacking.path} has not; add it, or set training.fit_on: train"
            )
    return replace(train, records=(*train.records, *validation.records))


def make_kind(config: TaskConfig, tables: Mapping[str, Table]) -> TaskKind[Any]:
    """Return the kind of a task, with its labels: of the training split, and of a validation split that was drawn from
    it. Raises UserError if there is only one, or if a needed split is missing."""
    if "train" not in tables and config.is_trained:
        raise UserError(f"task.train is missing: tasks of kind '{config.kind}' are trained")
    kind_type = find_kind(config.kind)
    if config.labels is not None or "train" not in tables:
        return kind_type(config, config.labels or ())
    train = tables["train"]
    if config.validation is None and "validation" in tables:
        train = replace(train, records=(*train.records, *tables["validation"].records))
    return kind_type(config, kind_type.find_labels(config, train))


def make_task(
    kind: TaskKind[Any], tables: Mapping[str, Table], spec: ModelSpec, length: int, training: TrainingConfig
) -> PreparedTask:
    """Encode the splits. length: tokens of a sequence, at most.

    Raises UserError for an invalid target, and as `load_inputs` does.
    """
    if training.label_smoothing and not kind.smooths_labels:
        raise UserError(f"training.label_smoothing: tasks of kind '{kind.config.kind}' have no use for it; set it to 0")
    if training.class_weights == "balanced" and not kind.weights_labels:
        raise UserError(f"training.class_weights: tasks of kind '{kind.config.kind}' have no classes to weight")
    tokenizer, inputs = load_inputs(kind.config, spec, length)
    encoder = Encoder(tokenizer, length, inputs.token_types, kind.config.special_tokens_in_text)
    splits = {
        split: encode_split(
            table, kind, encoder, split == "train", track(table.records, f"tokenizing {split}", len(table), "rows")
        )
        for split, table in tables.items()
    }
    return PreparedTask(
        kind=kind,
        splits=splits,
        padding=Padding.of(tokenizer),
        label_weights=kind.label_weights(splits["train"].examples) if training.class_weights == "balanced" else None,
        label_smoothing=training.label_smoothing,
        positions=inputs.max_length,
    )


def load_inputs(config: TaskConfig, spec: ModelSpec, length: int) -> tuple[PreTrainedTokenizerBase, ModelInputs]:
    """Return the tokenizer of a model and what the model takes, see `read_model_inputs`.

    length: as above. Raises UserError for an unusable tokenizer or config, and for too few positions.
    """
    tokenizer = load_task_tokenizer(spec.folder, config, fine_tunes=True)
    inputs = read_model_inputs(spec, tokenizer)
    if inputs.max_length is not None and length > inputs.max_length:
        raise UserError(
            f"model.max_seq_length is {length}, the model in {spec.folder} has {inputs.max_length} positions; lower "
            "it, or extend the model by pretraining with model.max_positions"
        )
    return tokenizer, inputs


def encode_split(
    table: Table, kind: TaskKind[Any], encoder: Encoder, training: bool, records: Iterable[Record] | None = None
) -> Split:
    """Encode all records. records: the table's own, with a progress bar. Raises UserError for an invalid target."""
    expanded: list[list[Example]] = []
    for chunk in chunks(records or table.records, _RECORDS, _CHARACTERS):
        encoded = encoder.knowing([row for record in chunk for row in kind.encoded_texts(record)])
        expanded += [kind.expand(record, encoded, training) for record in chunk]
    return Split(
        table,
        examples=tuple(example for examples in expanded for example in examples),
        record_of=tuple(index for index, examples in enumerate(expanded) for _ in examples),
    )


def chunks(records: Iterable[Record], most: int, characters: int) -> Iterator[list[Record]]:
    """Yield consecutive records, at most `most`: fewer if they have this many characters."""
    chunk: list[Record] = []
    count = 0
    for record in records:
        chunk.append(record)
        count += _count_characters(record.values)
        if len(chunk) == most or count >= characters:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def _count_characters(value: object) -> int:
    """Count those of all texts in the values of a record."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_count_characters, parts))


def describe_task(task: PreparedTask) -> list[str]:
    """Return lines on the training split, and on surprises in any split."""
    lines = task.kind.describe(task.splits["train"].table) if "train" in task.splits else []
    unlabelled = [name for name, split in task.splits.items() if not split.table.labelled]
    return lines + [f"{name}: no labels, so it is predicted but not scored" for name in unlabelled]


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
    records = [replace(record, skipped=0) for record in table.records]  # they have numbers of their own
    rest = tuple(record for index, record in enumerate(records) if index not in indices)
    return replace(table, records=rest), replace(table, records=tuple(records[index] for index in sorted(indices)))


def related_records(records: Sequence[Record], columns: Columns) -> list[list[int]]:
    """Return the numbers of records that belong together, in order: turns of a dialogue, and records with the same
    context (a column of type CONTEXT), such as the questions on a text. Any other record is alone, also one whose
    context is empty."""
    shared = columns.roles(CONTEXT)
    units: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        context = _values(record, shared)
        has_context = any(text.strip() for text in context)
        units.setdefault(record.group or (context if has_context else index), []).append(index)
    return list(units.values())


def _too_small(table: Table, columns: Columns, units: int, once: int) -> UserError:
    """Return the error. once: how many units have a label that occurs once."""
    named = " and ".join(f"task.columns.{role}" for role, cell_type in columns.cell_types().items() if cell_type.target)
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


def _values(record: Record, roles: Sequence[str]) -> tuple[str, ...]:
    return tuple(record.values[role] for role in roles)
