"""Compute the outputs of examples in batches of similar length, and decode them: in training and in `predictor`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune.device import Device
from finetune.encoding.encoded_split import Split, collate
from finetune.encoding.examples import Example, Padding
from finetune.task_kind import Loss, LossOptions, Prediction, TaskKind
from finetune.training.batch_order import evaluation_batches
from finetune.training.microbatch import Microbatch

Outputs = list[list[NDArray[np.float32]]]
"""What a model computes for each example: one array per sequence."""


@dataclass(frozen=True)
class Inference:
    """A model, and how its inputs are batched."""

    model: nn.Module
    kind: TaskKind[Any]
    padding: Padding
    device: Device
    microbatch: Microbatch

    def compute(self, examples: Sequence[Example], options: LossOptions | None = None) -> tuple[Outputs, Loss | None]:
        """The outputs of every example, and the loss of those that have targets; None if none has.

        Microbatches consist of examples of similar length. options: None to compute no loss.
        """
        self.model.eval()
        outputs: Outputs = [[] for _ in examples]
        losses: list[Loss] = []

        def compute(parts: Sequence[Sequence[int]]) -> None:
            computed = [self._compute_batch([examples[index] for index in indices], options) for indices in parts]
            for indices, (rows, loss) in zip(parts, computed, strict=True):
                for index in indices:
                    outputs[index] = [next(rows) for _ in examples[index].sequences]
                losses.extend([loss] if loss else [])

        with torch.inference_mode():
            for indices in evaluation_batches([example.longest for example in examples], self.microbatch.size):
                self.microbatch.compute(indices, compute)
        return outputs, _total(losses) if losses else None

    def _compute_batch(
        self, examples: Sequence[Example], options: LossOptions | None
    ) -> tuple[Iterator[NDArray[np.float32]], Loss | None]:
        """The outputs of all sequences in order, and the loss."""
        batch = collate(self.kind, examples, self.padding, self.device.device)
        with self.device.autocast():
            outputs = self.kind.forward(self.model, batch)
        loss = None if options is None or batch.targets is None else self.kind.loss(outputs, batch, options)
        return iter(outputs.float().cpu().numpy()), loss


def decode(kind: TaskKind[Any], split: Split, outputs: Outputs) -> tuple[Prediction, ...]:
    """The predictions of all records from the outputs of all examples."""
    examples_of: list[list[int]] = [[] for _ in split.table.records]
    for index, record in enumerate(split.record_of):
        examples_of[record].append(index)
    return tuple(
        kind.decode(
            record,
            [split.examples[index] for index in indices],
            [output for index in indices for output in outputs[index]],
        )
        for record, indices in zip(split.table.records, examples_of, strict=True)
    )


def _total(losses: Sequence[Loss]) -> Loss:
    sums = [torch.stack([getattr(loss, part) for loss in losses]).double().sum() for part in ("sum", "weight")]
    return Loss(*sums)
