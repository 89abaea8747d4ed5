"""Compute the outputs of examples in batches of similar length, decode and score them: in training and prediction."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune.config import TrainingConfig
from finetune.device import Device, MicrobatchSize
from finetune.encoding.examples import Batch, Example, Padding, Split, pad_sequences
from finetune.prepared_task import PreparedTask
from finetune.task_kind import Loss, LossOptions, Prediction, TaskKind

T = TypeVar("T")
Outputs = list[list[NDArray[np.float32]]]
"""The outputs of a model for each example: one array per sequence."""

_EVALUATION_FACTOR = 4  # evaluation batches are larger: no activations are kept
_COMPARED = 128  # examples whose outputs a loss compares in evaluations, whatever is computed at once


def collate(kind: TaskKind[Any], examples: Sequence[Example], padding: Padding, device: torch.device) -> Batch:
    """Return a batch of all sequences of the examples, padded to the longest of them."""
    inputs = pad_sequences([tokens for example in examples for tokens in example.sequences], padding, device)
    targets = None if any(example.target is None for example in examples) else kind.targets(examples)
    return Batch(tuple(examples), inputs, None if targets is None else targets.to(device, non_blocking=True))


@dataclass(frozen=True)
class Inference:
    """A model, and how its inputs are batched."""

    model: nn.Module
    kind: TaskKind[Any]
    padding: Padding
    device: Device
    microbatch: MicrobatchSize

    def compute(self, examples: Sequence[Example], options: LossOptions | None = None) -> tuple[Outputs, Loss | None]:
        """Return the outputs of every example, and the loss of the examples with targets; None without any.

        Microbatches consist of examples of similar length. options: None to compute no loss.
        """
        self.model.eval()
        outputs: Outputs = [[] for _ in examples]
        losses: list[Loss] = []

        def compute(parts: Sequence[Sequence[int]]) -> None:
            computed = [self.compute_batch([examples[index] for index in indices], options) for indices in parts]
            for indices, (found, loss) in zip(parts, computed, strict=True):
                for index, rows in zip(indices, found, strict=True):
                    outputs[index] = rows
                losses.extend([loss] if loss else [])

        lengths = [example.longest for example in examples]
        for indices in evaluation_batches(lengths, self.microbatch.size, self.padding.is_avoided):
            self.microbatch.compute(indices, compute)
        return outputs, _total(losses)

    @torch.inference_mode()
    def compute_batch(
        self, examples: Sequence[Example], options: LossOptions | None = None
    ) -> tuple[Outputs, Loss | None]:
        """Like `compute`, in one microbatch."""
        batch = collate(self.kind, examples, self.padding, self.device.torch_device)
        with self.device.autocast():
            outputs = self.kind.forward(self.model, batch)
        loss = None if options is None or batch.targets is None else self.kind.loss(outputs, batch, options)
        rows = iter(outputs.float().cpu().numpy())
        return [[next(rows) for _ in example.sequences] for example in examples], loss

    def compare(self, examples: Sequence[Example], outputs: Outputs, options: LossOptions) -> Loss | None:
        """Return the loss of a kind that compares examples, from their outputs; None without targets.

        It depends on no microbatch, unlike one that is computed with the outputs.
        """
        losses: list[Loss] = []
        for indices in evaluation_batches([example.longest for example in examples], _COMPARED):
            batch = collate(self.kind, [examples[index] for index in indices], self.padding, self.device.torch_device)
            if batch.targets is not None:
                rows = np.stack([row for index in indices for row in outputs[index]])
                losses.append(self.kind.loss(torch.from_numpy(rows).to(self.device.torch_device), batch, options))
        return _total(losses)


def _total(losses: Sequence[Loss]) -> Loss | None:
    if not losses:
        return None
    return Loss(*(torch.stack([getattr(loss, part) for loss in losses]).double().sum() for part in ("sum", "weight")))


def evaluation_batches(lengths: Sequence[int], batch_size: int, equal: bool = False) -> list[list[int]]:
    """Batch all examples, by index, with others of similar length, or only of the same one. The longest come first, to
    run out of memory early if at all."""
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups = [list(group) for _, group in groupby(by_length, lengths.__getitem__)] if equal else [by_length]
    return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]


def compute_together(
    examples: Sequence[Example], padding: Padding, compute: Callable[[Sequence[Example]], Sequence[T]]
) -> list[T]:
    """Compute all examples in one batch or, if padding is to be avoided, in one for each length."""
    if not padding.is_avoided:
        return list(compute(examples))
    found: dict[int, T] = {}
    for indices in evaluation_batches([example.longest for example in examples], len(examples), equal=True):
        found.update(zip(indices, compute([examples[index] for index in indices]), strict=True))
    return [found[index] for index in range(len(examples))]


def decode(kind: TaskKind[Any], split: Split, outputs: Outputs) -> tuple[Prediction, ...]:
    """Return the predictions of all records from the outputs of all examples."""
    rest = iter(outputs)
    return tuple(
        kind.decode(record, examples, [output for _ in examples for output in next(rest)])
        for record, examples in zip(split.table.records, split.examples_of, strict=True)
    )


def without_padding(examples: Sequence[Example], outputs: Outputs) -> Iterator[NDArray[np.float32]]:
    """Yield the output of each sequence; of those with values for each token, without the padding, which comes last."""
    for example, rows in zip(examples, outputs, strict=True):
        for tokens, row in zip(example.sequences, rows, strict=True):
            yield row[: len(tokens)] if row.ndim > 1 else row


def describe_not_finite(precision: str) -> str:
    """Return a message about a model's outputs that are infinite or NaN."""
    advice = {"fp16": "use bf16 or fp32", "fp32": "its weights are damaged, or its training has diverged"}
    return f"the model's outputs are not finite in {precision}; {advice.get(precision, 'use fp32')}"


def evaluation_microbatch(config: TrainingConfig) -> MicrobatchSize:
    computed = config.microbatch_size or config.batch_size
    return MicrobatchSize(config.eval_batch_size or computed * _EVALUATION_FACTOR)


@dataclass(frozen=True)
class Evaluation:
    """Predictions for the records of a split, in order."""

    predictions: tuple[Prediction, ...]
    loss: float | None  # mean, weighted as in training; None without targets
    scores: dict[str, float]  # empty without targets
    is_finite: bool = True  # whether all outputs are finite


def evaluate(model: nn.Module, task: PreparedTask, split: Split, microbatch: MicrobatchSize) -> Evaluation:
    """Predict all records of a split, and score them if it has targets."""
    inference = Inference(model, task.kind, task.padding, task.device, microbatch)
    options, compares = task.loss_options, task.kind.compares_examples
    outputs, loss = inference.compute(split.examples, None if compares else options)
    if compares:
        loss = inference.compare(split.examples, outputs, options)
    predictions = decode(task.kind, split, outputs)
    is_finite = all(np.isfinite(row).all() for row in without_padding(split.examples, outputs))
    if loss is None:
        return Evaluation(predictions, None, {}, is_finite)
    records = split.table.records
    related = tuple(task.kind.relate(records, predictions))
    return Evaluation(related, (loss.sum / loss.weight).item(), task.kind.scores(records, related), is_finite)
