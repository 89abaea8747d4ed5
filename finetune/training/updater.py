"""Updates of a model: forward, backward, clipping, optimizer step, learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from finetune.config import TrainingConfig
from finetune.device import Device
from finetune.encoding.examples import Example, collate
from finetune.splits import Task
from finetune.task_kind import Loss, LossOptions

_MAX_GRAD_NORM = 1.0


class Updater:
    """AdamW with linear warmup and decay, as BERT (Devlin et al. 2019) is fine-tuned."""

    def __init__(self, model: nn.Module, task: Task, config: TrainingConfig, device: Device) -> None:
        model.to(device.device)
        self.steps = 0
        self.total_steps = steps_per_epoch(task, config) * config.epochs
        self._model, self._task, self._config, self._device = model, task, config, device
        groups = parameter_groups(model, config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self._scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
        self.loss_options = loss_options(task, device)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, examples: Sequence[Example]) -> Loss:
        """Update the model on these examples.

        The gradient is that of their mean loss. If they are fewer than a batch, as at the end of an epoch, it is scaled
        down by their number, so that every example of an epoch counts the same.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * lr_factor(self.steps, self.total_steps, self._config.warmup_ratio)
        loss = self._backward(examples)
        self._scaler.unscale_(self._optimizer)
        self._scale_gradients(len(examples) / loss.weight)
        clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.steps += 1
        return loss

    def _backward(self, examples: Sequence[Example]) -> Loss:
        """Add up the gradients of the summed loss, divided by the batch size to keep them within the range of fp16."""
        kind = self._task.kind
        batch = collate(kind, examples, self._task.padding, self._device.device)
        with self._device.autocast():
            outputs = kind.forward(self._model, batch)
        loss = kind.loss(outputs, batch, self.loss_options)
        self._scaler.scale(loss.sum / self._config.batch_size).backward()  # type: ignore[no-untyped-call]
        return Loss(loss.sum.detach(), loss.weight)

    def _scale_gradients(self, factor: torch.Tensor) -> None:
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)


def loss_options(task: Task, device: Device) -> LossOptions:
    weights = task.label_weights
    return LossOptions(None if weights is None else torch.tensor(weights, device=device.device))


def lr_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor of the learning rate at a step (from 0): linear warmup, then linear decay to 0 after the last step."""
    warmup = warmup_ratio * steps
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(steps - warmup, 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay for matrices, none for vectors, which are biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def steps_per_epoch(task: Task, config: TrainingConfig) -> int:
    return -(-len(task.splits["train"].examples) // config.batch_size)
