"""Training with one seed: fit, score the validation split after each epoch, keep the best epoch, predict with it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from experiment.errors import UserError
from finetune.config import TrainingConfig
from finetune.tasks.examples import Examples, collate, evaluation_order, training_order
from finetune.tasks.kinds import TaskKind

Probabilities = NDArray[np.float32]  # NC: N examples of a split, C labels

_MAX_GRAD_NORM = 1.0
_EVALUATION_FACTOR = 4  # batches are larger where no activations are kept
_EVENTS_PER_SEED = 40  # each waits for the device once

Log = Callable[[int, Mapping[str, int | float | str | None]], None]  # takes finished steps and their figures


@dataclass(frozen=True)
class Device:
    """Where the model is computed, and in which precision beside its fp32 weights (None: fp32)."""

    device: torch.device
    autocast: torch.dtype | None

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield


@dataclass(frozen=True)
class Task:
    """A task made ready for training."""

    kind: TaskKind
    metric: str
    splits: Mapping[str, Examples]  # "train", "validation" and perhaps "test"
    label_weights: tuple[float, ...] | None  # of the loss
    pad_token_id: int


@dataclass(frozen=True)
class Epoch:
    epoch: int  # from 1
    steps: int  # taken so far
    train_loss: float  # mean over the epoch's examples, as it went
    validation_loss: float
    scores: dict[str, float]  # on validation
    seconds: float  # of training, without evaluation


@dataclass(frozen=True)
class Fitted:
    epochs: tuple[Epoch, ...]
    best: Epoch
    probabilities: Mapping[str, Probabilities]  # of every split but train, by the best epoch's weights


def choose_device(precision: str) -> Device:
    """CUDA where there is one, else the CPU. `auto` is bf16 where the device computes it natively, else fp32.

    Raises UserError for a precision that the device lacks.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = any(torch.cpu.get_capabilities().get(feature, False) for feature in ("avx512_bf16", "amx_bf16"))
    if precision == "fp16" and device.type == "cpu":
        raise UserError("training.precision: fp16 needs a CUDA device; a CPU trains in bf16 or fp32")
    if precision == "bf16" and not bf16 and device.type == "cuda":
        raise UserError("training.precision: this GPU has no bf16; use fp16 or fp32")
    chosen = ("bf16" if bf16 else "fp32") if precision == "auto" else precision
    return Device(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen])


def fit(model: Any, task: Task, config: TrainingConfig, seed: int, device: Device, log: Log) -> Fitted:
    """Train `model` in place; it ends with the weights of the epoch that was best on validation, of equals the first.

    AdamW with linear warmup and decay, as BERT (Devlin et al. 2019) is fine-tuned. The seed fixes the order of the
    examples and the dropout; the model's fresh head is the caller's. Raises UserError where the loss becomes infinite.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    train = task.splits["train"]
    steps = steps_per_epoch(task, config) * config.epochs
    model.to(device.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.autocast == torch.float16)
    weights = None if task.label_weights is None else torch.tensor(task.label_weights, device=device.device)

    step = 0
    epochs: list[Epoch] = []
    best: tuple[Epoch, dict[str, Tensor], Probabilities] | None = None
    for number in range(1, config.epochs + 1):
        model.train()
        meter = _LossMeter(device.device)
        for places in training_order(train.lengths, config.batch_size, order):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(step, steps, config.warmup_ratio)
            batch = collate(train, places, task.pad_token_id, device.device)
            with device.computing():
                logits = model(**batch.inputs).logits
            loss = task.kind.loss(logits, batch.targets, weights)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            meter.add(loss.detach(), len(places), sum(train.lengths[place] for place in places))
            step += 1
            if step % max(1, steps // _EVENTS_PER_SEED) == 0:
                figures = {"lr": optimizer.param_groups[0]["lr"], **meter.interval()}
                log(step, {"seed": seed, "epoch": number, **figures})
        train_loss, seconds = meter.epoch()
        probabilities, validation_loss = predict(model, task, "validation", config.batch_size, device)
        if not math.isfinite(train_loss) or not math.isfinite(validation_loss):
            raise UserError(
                f"seed {seed}, epoch {number}: training diverged (loss {train_loss:g} on train, {validation_loss:g} on "
                f"validation); try a training.lr below {config.lr:g}"
            )
        scores = score(task, "validation", probabilities)
        epochs.append(Epoch(number, step, train_loss, validation_loss, scores, seconds))
        figures = {f"eval/validation/{name}": value for name, value in {"loss": validation_loss, **scores}.items()}
        log(step, {"seed": seed, "epoch": number, **figures})
        if best is None or scores[task.metric] > best[0].scores[task.metric]:
            kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
            best = epochs[-1], kept, probabilities

    assert best is not None
    model.load_state_dict(best[1])
    predictions = {"validation": best[2]}
    if "test" in task.splits:
        predictions["test"], _ = predict(model, task, "test", config.batch_size, device)
    return Fitted(tuple(epochs), best[0], predictions)


class _LossMeter:
    """Mean training loss and pace, over the interval between two log events and over the epoch."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the interval, of the epoch: summed loss
        self._examples = [0, 0]
        self._tokens = 0
        self._began = [time.monotonic()] * 2

    def add(self, loss: Tensor, examples: int, tokens: int) -> None:
        self._sums += loss * examples
        self._examples = [count + examples for count in self._examples]
        self._tokens += tokens

    def interval(self) -> dict[str, float]:
        """The figures since the last call."""
        figures = {
            "loss": self._sums[0].item() / self._examples[0],
            "tokens_per_second": self._tokens / (time.monotonic() - self._began[0]),
        }
        self._sums[0] = 0.0
        self._examples[0] = self._tokens = 0
        self._began[0] = time.monotonic()
        return figures

    def epoch(self) -> tuple[float, float]:
        """Mean loss per example, seconds."""
        return self._sums[1].item() / self._examples[1], time.monotonic() - self._began[1]


def predict(model: Any, task: Task, split: str, batch_size: int, device: Device) -> tuple[Probabilities, float]:
    """Probabilities of every example of a split, in its order, and the mean loss (NaN for one without labels)."""
    examples = task.splits[split]
    model.eval()
    batches = evaluation_order(examples.lengths, batch_size * _EVALUATION_FACTOR)
    outputs: list[Tensor] = []
    loss_sum = torch.zeros((), device=device.device)
    with torch.inference_mode():
        for places in batches:
            batch = collate(examples, places, task.pad_token_id, device.device)
            with device.computing():
                logits = model(**batch.inputs).logits
            outputs.append(task.kind.probabilities(logits))
            loss_sum += (
                torch.nan if examples.targets is None else task.kind.loss(logits, batch.targets, None) * len(places)
            )
    in_batch_order = torch.tensor([place for places in batches for place in places])
    probabilities = torch.cat(outputs).cpu()[torch.argsort(in_batch_order)]
    return probabilities.numpy(), loss_sum.item() / len(examples)


def score(task: Task, split: str, probabilities: Probabilities) -> dict[str, float]:
    """Every metric of a split that has labels."""
    targets = task.splits[split].targets
    assert targets is not None
    return task.kind.scores(np.array(targets), probabilities)


def lr_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """What multiplies the learning rate at a step (from 0): up in a straight line, then down to 0 after the last."""
    warmup = warmup_ratio * steps
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(steps - warmup, 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay for matrices, none for biases and norms, which are vectors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def steps_per_epoch(task: Task, config: TrainingConfig) -> int:
    return -(-len(task.splits["train"]) // config.batch_size)
