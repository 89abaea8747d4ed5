"""Predict and score a split."""

from dataclasses import dataclass

from torch import nn

from finetune.device import Device
from finetune.encoding.encoded_split import Split
from finetune.inference import Inference, decode
from finetune.splits import Task
from finetune.task_kind import Prediction
from finetune.training.microbatch import Microbatch

EVALUATION_FACTOR = 4  # evaluation batches are larger: no activations are kept


@dataclass(frozen=True)
class Evaluation:
    """Predictions for the records of a split, in order."""

    predictions: tuple[Prediction, ...]
    loss: float | None  # mean, weighted as in training; None without targets
    scores: dict[str, float]  # empty without targets


def evaluate(model: nn.Module, task: Task, split: Split, microbatch: Microbatch, device: Device) -> Evaluation:
    """Predict all records of a split, and score them if it has targets."""
    inference = Inference(model, task.kind, task.padding, device, microbatch)
    outputs, loss = inference.compute(split.examples, task.loss_options(device.device))
    predictions = decode(task.kind, split, outputs)
    if not split.table.labelled or loss is None:
        return Evaluation(predictions, None, {})
    return Evaluation(predictions, (loss.sum / loss.weight).item(), task.kind.scores(split.table.records, predictions))
