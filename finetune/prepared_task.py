"""A task whose splits are encoded for one model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.progress import track
from finetune.config import TrainingConfig
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.device import CPU, Device
from finetune.encoding.encoder import Encoder, load_task_tokenizer
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
    loss_options: LossOptions = field(default_factory=LossOptions)
    positions: int | None = None  # of the model, in tokens; None: no limit
    device: Device = CPU

    def is_better(self, scores: Mapping[str, float], others: Mapping[str, float]) -> bool:
        """Return whether scores are better than others, by the task's metric."""
        metric = self.kind.config.metric
        score, other = scores[metric], others[metric]
        return score < other if metric in self.kind.lower_is_better else score > other


def make_kind(config: TaskConfig, tables: Mapping[str, Table]) -> TaskKind[Any]:
    """Return the kind of a task, with its labels: of the training split, and of a validation split that was drawn from
    it. Raises UserError if there is only one, or if a needed split is missing."""
    if "train" not in tables and config.is_trained:
        raise UserError(f"task.train is missing: tasks of kind '{config.kind}' are trained")
    if not tables:
        raise UserError("nothing to score: task.validation and task.test are missing")
    kind_type = find_kind(config.kind)
    if config.labels is not None or "train" not in tables:
        return kind_type(config, config.labels or ())
    train = tables["train"]
    if config.validation is None and "validation" in tables:
        train = replace(train, records=(*train.records, *tables["validation"].records))
    return kind_type(config, kind_type.find_labels(config, train))


def make_task(
    kind: TaskKind[Any],
    tables: Mapping[str, Table],
    spec: ModelSpec,
    length: int,
    training: TrainingConfig,
    device: Device = CPU,
) -> tuple[PreparedTask, Encoder]:
    """Encode the splits. Returns the encoder too. length: tokens of a sequence, at most.

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
    weights = None
    if training.class_weights == "balanced":
        weights = torch.tensor(kind.label_weights(splits["train"].examples), device=device.torch_device)
    options = LossOptions(weights, training.label_smoothing)
    return PreparedTask(kind, splits, Padding.of(tokenizer), options, inputs.max_length, device), encoder


def load_inputs(config: TaskConfig, spec: ModelSpec, length: int) -> tuple[PreTrainedTokenizerBase, ModelInputs]:
    """Return the tokenizer of a model and what the model takes, see `read_model_inputs`.

    length: tokens of a sequence, at most. Raises UserError for an unusable tokenizer or config, and for too few
    positions.
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
    """Encode all records; in training, those without examples are left out. records: the table's own, with a progress
    bar. Raises UserError for an invalid target."""
    expanded: list[tuple[Example, ...]] = []
    for chunk in chunks(records or table.records, _RECORDS, _CHARACTERS):
        encoded = encoder.with_cache([row for record in chunk for row in kind.encoded_texts(record)])
        expanded += [tuple(kind.expand(record, encoded, training)) for record in chunk]
    if training:
        table = replace(table, records=tuple(compress(table.records, expanded)))
        expanded = [examples for examples in expanded if examples]
    return Split(table, tuple(expanded))


def chunks(records: Iterable[Record], most: int, characters: int) -> Iterator[list[Record]]:
    """Yield consecutive records, at most `most`: fewer if they have about this many characters."""
    chunk: list[Record] = []
    count = 0
    for record in records:
        chunk.append(record)
        count += len(str(record.values))
        if len(chunk) == most or count >= characters:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def describe_task(kind: TaskKind[Any], tables: Mapping[str, Table]) -> list[str]:
    """Return lines on the training split, and on surprises in any split."""
    lines = kind.describe(tables["train"]) if "train" in tables else []
    unlabelled = [name for name, table in tables.items() if not table.labelled]
    return lines + [f"{name}: no labels, so it is predicted but not scored" for name in unlabelled]
