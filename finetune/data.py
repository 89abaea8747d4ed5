"""Read and tokenize the splits of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from experiment.tokenizer import load_any_tokenizer
from finetune.config import FinetuneConfig, TaskConfig
from finetune.model import ModelSpec, read_model_inputs
from finetune.tasks.examples import Examples, tokenize
from finetune.tasks.kinds import KINDS, TaskKind, balanced_weights
from finetune.tasks.rows import TaskTable, read_table

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A task, ready for training."""

    kind: TaskKind
    metric: str
    splits: Mapping[str, Examples]  # "train", "validation" and perhaps "test"
    label_weights: tuple[float, ...] | None  # of the loss
    pad_token_id: int


def read_splits(task: TaskConfig) -> dict[str, TaskTable]:
    """The rows of each split. Raises UserError with file and line."""
    columns = {role: column for role, column in task.columns.model_dump().items() if column is not None}
    csv_format = CsvFormat(task.sep, task.quoting, header=task.header == 0, quoting_key="task.quoting:")
    return {
        split: read_table(Path(path), columns, csv_format, label_required=split != "test")
        for split in SPLITS
        if (path := getattr(task, split)) is not None
    }


def find_labels(task: TaskConfig, train: TaskTable) -> tuple[str, ...]:
    """The labels in the order of their ids. Raises UserError if there is only one."""
    return task.labels or KINDS[task.kind].find_labels(train)


def make_task(config: FinetuneConfig, spec: ModelSpec, tables: Mapping[str, TaskTable]) -> Task:
    """Tokenize. Raises UserError for an unknown label, and sequences longer than the model's positions."""
    kind = KINDS[config.task.kind]
    tokenizer = load_any_tokenizer(spec.folder, needed=("pad_token",))
    inputs = read_model_inputs(spec, tokenizer)
    length = config.model.max_seq_length
    if inputs.max_length is not None and length > inputs.max_length:
        raise UserError(
            f"model.max_seq_length is {length}, the model in {spec.folder} has {inputs.max_length} positions"
        )
    splits = {
        split: tokenize(table, kind, spec.labels, tokenizer, length, inputs.token_types)
        for split, table in tables.items()
    }
    weights = None
    if config.training.class_weights == "balanced":
        weights = tuple(balanced_weights(splits["train"].targets or (), len(spec.labels)))
    return Task(kind, config.task.metric, splits, weights, tokenizer.pad_token_id)


def describe_task(task: Task, labels: Sequence[str]) -> list[str]:
    """One line on the frequency of each label, and one on each thing in the data that may surprise the user."""
    targets = np.array(task.splits["train"].targets)
    shares = np.bincount(targets, minlength=len(labels)) / len(targets)
    named = ", ".join(f"{label} {share:.1%}" for label, share in zip(labels, shares, strict=True))
    lines = [f"{len(labels)} labels, in train: {named}"]
    for split, examples in task.splits.items():
        if examples.truncated:
            lines.append(f"{split}: {examples.truncated:,} of {len(examples):,} examples are cut at max_seq_length")
        if examples.targets is None:
            lines.append(f"{split}: no labels, so it is predicted but not scored")
        if empty := sum(not all(text.strip() for text in task.kind.texts(row)) for row in examples.table.rows):
            lines.append(f"{split}: {empty:,} rows have an empty text")
    return lines
