"""Train with one seed: score the validation split after each epoch, keep the best epoch, predict with it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from experiment.errors import UserError
from finetune.config import TrainingConfig
from finetune.data import Task
from finetune.device import Device
from finetune.tasks.examples import collate, evaluation_batches, training_batches

Probabilities = NDArray[np.float32]  # NC: N examples of a split, C labels

_MAX_GRAD_NORM = 1.0
_EVALUATION_FACTOR = 4  # evaluation batches are larger: no activations are kept
_EVENTS_PER_SEED = 40  # each waits for the device once

Log = Callable[[int, Mapping[str, int | float | str | None]], None]
"""Logs metrics; takes the number of finished steps and the metrics."""


@dataclass(frozen=True)
class Epoch:
    epoch: int  # from 1
    steps: int  # taken so far
    train_loss: float  # mean over the epoch's examples, while training
    validation_loss: float
    scores: dict[str, float]  # on validation
    seconds: float  # of training, without evaluation


@dataclass(frozen=True)
class Fitted:
    epochs: tuple[Epoch, ...]
    best: Epoch
    probabilities: Mapping[str, Probabilities]  # of every split but train, with the best epoch's weights


@dataclass(frozen=True)
class _Best:
    epoch: Epoch
    weights: dict[str, Tensor]  # on the CPU
    validation: Probabilities


def fit(model: nn.Module, task: Task, config: TrainingConfig, seed: int, device: Device, log: Log) -> Fitted:
    """Train `model` in place. It ends with the weights of the epoch that is best on validation, the first of equals.

    AdamW with linear warmup and decay, as BERT (Devlin et al. 2019) is fine-tuned. The seed determines the order of the
    examples and dropout; the caller seeds the model's head. Raises UserError if the loss is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train = task.splits["train"]
    updater = _Updater(model, task, config, device)
    log_every = max(1, updater.total_steps // _EVENTS_PER_SEED)

    epochs: list[Epoch] = []
    best: _Best | None = None
    for number in range(1, config.epochs + 1):
        model.train()
        meter = _LossMeter(device.device)
        for indices in training_batches(train.lengths, config.batch_size, generator):
            loss = updater.step(indices)
            meter.add(loss, len(indices), sum(train.lengths[index] for index in indices))
            if updater.steps % log_every == 0:
                log(updater.steps, {"seed": seed, "epoch": number, "lr": updater.lr, **meter.interval()})
        train_loss, seconds = meter.epoch()
        probabilities, validation_loss = predict(model, task, "validation", config.batch_size, device)
        _check_finite(train_loss, validation_loss, seed, number, config.lr)
        scores = score(task, "validation", probabilities)
        epochs.append(Epoch(number, updater.steps, train_loss, validation_loss, scores, seconds))
        metrics = {f"eval/validation/{name}": value for name, value in {"loss": validation_loss, **scores}.items()}
        log(updater.steps, {"seed": seed, "epoch": number, **metrics})
        if best is None or scores[task.metric] > best.epoch.scores[task.metric]:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
            best = _Best(epochs[-1], weights, probabilities)

    assert best is not None
    model.load_state_dict(best.weights)
    predictions = {"validation": best.validation}
    if "test" in task.splits:
        predictions["test"], _ = predict(model, task, "test", config.batch_size, device)
    return Fitted(tuple(epochs), best.epoch, predictions)


class _Updater:
    """Optimizer steps: forward, backward, clipping, update, learning rate."""

    def __init__(self, model: nn.Module, task: Task, config: TrainingConfig, device: Device) -> None:
        model.to(device.device)
        self.steps = 0
        self.total_steps = steps_per_epoch(task, config) * config.epochs
        self._model, self._task, self._config, self._device = model, task, config, device
        groups = parameter_groups(model, config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self._scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
        weights = task.label_weights
        self._label_weights = None if weights is None else torch.tensor(weights, device=device.device)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, indices: Sequence[int]) -> Tensor:
        """Train on the examples at `indices` of the training split. Returns their mean loss, on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * lr_factor(self.steps, self.total_steps, self._config.warmup_ratio)
        batch = collate(self._task.splits["train"], indices, self._task.pad_token_id, self._device.device)
        with self._device.autocast():
            logits = self._model(**batch.inputs).logits
        loss = self._task.kind.loss(logits, batch.targets, self._label_weights)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimizer)
        clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.steps += 1
        return loss.detach()


class _LossMeter:
    """Mean training loss and throughput since the last log event, and over the epoch."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss: of the interval, of the epoch
        self._examples = [0, 0]
        self._tokens = 0
        self._started = [time.monotonic()] * 2

    def add(self, loss: Tensor, examples: int, tokens: int) -> None:
        """Count a batch. loss: mean over its examples."""
        self._sums += loss * examples
        self._examples = [count + examples for count in self._examples]
        self._tokens += tokens

    def interval(self) -> dict[str, float]:
        """Metrics since the last call."""
        metrics = {
            "loss": self._sums[0].item() / self._examples[0],
            "tokens_per_second": self._tokens / (time.monotonic() - self._started[0]),
        }
        self._sums[0] = 0.0
        self._examples[0] = self._tokens = 0
        self._started[0] = time.monotonic()
        return metrics

    def epoch(self) -> tuple[float, float]:
        """Mean loss per example, seconds."""
        return self._sums[1].item() / self._examples[1], time.monotonic() - self._started[1]


def _check_finite(train_loss: float, validation_loss: float, seed: int, epoch: int, lr: float) -> None:
    if not math.isfinite(train_loss) or not math.isfinite(validation_loss):
        raise UserError(
            f"seed {seed}, epoch {epoch}: training diverged (loss {train_loss:g} on train, {validation_loss:g} on "
            f"validation); try a training.lr below {lr:g}"
        )


def predict(model: nn.Module, task: Task, split: str, batch_size: int, device: Device) -> tuple[Probabilities, float]:
    """Probabilities of every example of a split, in its order, and the mean loss (NaN without labels)."""
    examples = task.splits[split]
    model.eval()
    batches = evaluation_batches(examples.lengths, batch_size * _EVALUATION_FACTOR)
    outputs: list[Tensor] = []
    loss_sum = torch.zeros((), device=device.device)
    with torch.inference_mode():
        for indices in batches:
            batch = collate(examples, indices, task.pad_token_id, device.device)
            with device.autocast():
                logits = model(**batch.inputs).logits
            outputs.append(task.kind.probabilities(logits))
            loss_sum += (
                torch.nan if examples.targets is None else task.kind.loss(logits, batch.targets, None) * len(indices)
            )
    in_batch_order = torch.tensor([index for indices in batches for index in indices])
    probabilities = torch.cat(outputs).cpu()[torch.argsort(in_batch_order)]
    return probabilities.numpy(), loss_sum.item() / len(examples)


def score(task: Task, split: str, probabilities: Probabilities) -> dict[str, float]:
    """Every metric of a split that has labels."""
    targets = task.splits[split].targets
    assert targets is not None
    return task.kind.scores(np.array(targets), probabilities)


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
    return -(-len(task.splits["train"]) // config.batch_size)
