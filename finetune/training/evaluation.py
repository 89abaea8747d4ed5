"""Predict and score a split."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune.device import Device
from finetune.encoding.examples import Split, collate
from finetune.splits import Task
from finetune.task_kind import Prediction
from finetune.training.batch_order import evaluation_batches
from finetune.training.updater import loss_options

Outputs = list[list[NDArray[np.float32]]]
"""What a model computes for each example: one array per sequence."""

_EVALUATION_FACTOR = 4  # evaluation batches are larger: no activations are kept


@dataclass(frozen=True)
class Evaluation:
    """Predictions for the records of a split, in order."""

    predictions: tuple[Prediction, ...]
    loss: float | None  # mean, weighted as in training; None without targets
    scores: dict[str, float]  # empty without targets


def evaluate(model: nn.Module, task: Task, split: Split, batch_size: int, device: Device) -> Evaluation:
    """Predict all records of a split, and score them if it has targets. batch_size: of training."""
    outputs, loss = _compute_outputs(model, task, split, batch_size * _EVALUATION_FACTOR, device)
    predictions = decode(task, split, outputs)
    scores = task.kind.scores(split.table.records, predictions) if split.table.labelled else {}
    return Evaluation(predictions, loss, scores)


def decode(task: Task, split: Split, outputs: Outputs) -> tuple[Prediction, ...]:
    """The predictions of all records from the outputs of all examples."""
    examples_of: list[list[int]] = [[] for _ in split.table.records]
    for index, record in enumerate(split.record_of):
        examples_of[record].append(index)
    return tuple(
        task.kind.decode(
            record,
            [split.examples[index] for index in indices],
            [output for index in indices for output in outputs[index]],
        )
        for record, indices in zip(split.table.records, examples_of, strict=True)
    )


def _compute_outputs(
    model: nn.Module, task: Task, split: Split, batch_size: int, device: Device
) -> tuple[Outputs, float | None]:
    """The outputs of every example, and the mean loss."""
    model.eval()
    options = loss_options(task, device)
    outputs: Outputs = [[] for _ in split.examples]
    sums = torch.zeros(2, dtype=torch.float64, device=device.device)
    with torch.inference_mode():
        for indices in evaluation_batches(split.lengths, batch_size):
            batch = collate(task.kind, [split.examples[index] for index in indices], task.padding, device.device)
            with device.autocast():
                computed = task.kind.forward(model, batch)
            if batch.targets is not None:
                loss = task.kind.loss(computed, batch, options)
                sums += torch.stack([loss.sum, loss.weight])
            rows = iter(computed.float().cpu().numpy())
            for index in indices:
                outputs[index] = [next(rows) for _ in split.examples[index].sequences]
    total, weight = sums.tolist()
    return outputs, total / weight if split.table.labelled else None
