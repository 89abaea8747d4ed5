"""Train with one seed: score the validation split after each epoch, keep the best epoch, predict with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiment.errors import UserError
from finetune.config import TrainingConfig
from finetune.device import Device
from finetune.splits import Task
from finetune.training.batch_order import training_batches
from finetune.training.evaluation import Evaluation, evaluate
from finetune.training.loss_meter import LossMeter
from finetune.training.updater import Updater

_EVENTS_PER_SEED = 40  # each waits for the device once

Log = Callable[[int, Mapping[str, int | float | str | None]], None]
"""Logs metrics; takes the number of finished steps and the metrics."""


@dataclass(frozen=True)
class Epoch:
    epoch: int  # from 1
    steps: int  # taken so far
    train_loss: float  # mean over the epoch, while training
    validation_loss: float
    scores: dict[str, float]  # on validation
    seconds: float  # of training, without evaluation


@dataclass(frozen=True)
class Fitted:
    epochs: tuple[Epoch, ...]
    best: Epoch
    evaluations: Mapping[str, Evaluation]  # of every split but train, with the best epoch's weights


@dataclass(frozen=True)
class _Best:
    epoch: Epoch
    weights: dict[str, Tensor]  # on the CPU
    validation: Evaluation


def fit(model: nn.Module, task: Task, config: TrainingConfig, seed: int, device: Device, log: Log) -> Fitted:
    """Train `model` in place. It ends with the weights of the epoch that is best on validation, the first of equals.

    The seed determines the order of the examples and dropout; the caller seeds the model's head. Raises UserError if
    the loss is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    updater = Updater(model, task, config, device)
    epochs: list[Epoch] = []
    best: _Best | None = None
    for number in range(1, config.epochs + 1):
        train_loss, seconds = _train_epoch(model, task, config, updater, generator, _with(log, seed=seed, epoch=number))
        validation = evaluate(model, task, task.splits["validation"], config.batch_size, device)
        assert validation.loss is not None
        _check_finite(train_loss, validation.loss, seed, number, config.lr)
        epochs.append(Epoch(number, updater.steps, train_loss, validation.loss, validation.scores, seconds))
        metrics = {f"eval/validation/{name}": value for name, value in _losses_and_scores(validation).items()}
        log(updater.steps, {"seed": seed, "epoch": number, **metrics})
        if best is None or task.is_better(validation.scores, best.epoch.scores):
            weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
            best = _Best(epochs[-1], weights, validation)

    assert best is not None
    model.load_state_dict(best.weights)
    others = {
        name: evaluate(model, task, split, config.batch_size, device)
        for name, split in task.splits.items()
        if name not in ("train", "validation")
    }
    return Fitted(tuple(epochs), best.epoch, {"validation": best.validation, **others})


def _train_epoch(
    model: nn.Module, task: Task, config: TrainingConfig, updater: Updater, generator: torch.Generator, log: Log
) -> tuple[float, float]:
    """Mean loss, seconds."""
    train = task.splits["train"]
    log_every = max(1, updater.total_steps // _EVENTS_PER_SEED)
    model.train()
    meter = LossMeter(next(model.parameters()).device)
    for indices in training_batches(train.lengths, config.batch_size, generator):
        examples = [train.examples[index] for index in indices]
        meter.add(updater.step(examples), sum(example.tokens for example in examples))
        if updater.steps % log_every == 0:
            log(updater.steps, {"lr": updater.lr, **meter.interval()})
    return meter.epoch()


def _with(log: Log, **constants: int) -> Log:
    return lambda step, metrics: log(step, {**constants, **metrics})


def _losses_and_scores(evaluation: Evaluation) -> dict[str, float | None]:
    return {"loss": evaluation.loss, **evaluation.scores}


def _check_finite(train_loss: float, validation_loss: float, seed: int, epoch: int, lr: float) -> None:
    if not math.isfinite(train_loss) or not math.isfinite(validation_loss):
        raise UserError(
            f"seed {seed}, epoch {epoch}: training diverged (loss {train_loss:g} on train, {validation_loss:g} on "
            f"validation); try a training.lr below {lr:g}"
        )
