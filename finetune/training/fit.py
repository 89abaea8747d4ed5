"""Train with one seed: score the validation split at intervals, keep the best weights, predict with them."""

import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiment.errors import StoppedError, UserError, first_line
from experiment.files import atomic_write
from experiment.models.fast_linear import use_fast_linear
from experiment.process.signals import uninterrupted
from finetune.config import TrainingConfig, changed_settings
from finetune.inference import Evaluation, describe_not_finite, evaluate, evaluation_microbatch
from finetune.prepared_task import PreparedTask
from finetune.task_kind import Loss
from finetune.training.updater import Updater, steps_per_epoch, training_order

State = dict[str, Any]  # tensors and plain values

_EVENTS_PER_SEED = 40  # each waits for the device once

Log = Callable[[int, Mapping[str, int | float | str | None]], None]
"""Logs metrics; takes the number of finished steps and the metrics."""


class DivergedError(RuntimeError):
    """The loss or an output is not finite. The message is complete."""


@dataclass(frozen=True)
class StateFile:
    """Holds the state of a training with these settings, at its last evaluation or when it was stopped."""

    path: Path
    settings: Mapping[str, Any]  # plain values

    def save(self, state: State) -> None:
        """Replace the file atomically."""
        with atomic_write(self.path) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"settings": self.settings, "state": state}, file)
            except RuntimeError as error:  # of torch's writer, which hides what ended it
                hidden = error.__context__
                raise (hidden if isinstance(hidden, OSError | KeyboardInterrupt) else error) from None

    def load(self, verified: bool = True) -> State | None:
        """Return the last state; None if there is none for these settings. Raises UserError if the file is damaged.
        verified: read all tensors, which may be gigabytes, to compare their checksums."""
        saved = self._read(verified)
        return None if saved is None or changed_settings(self.settings, saved["settings"]) else saved["state"]

    def _read(self, verified: bool) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as file:
                if verified and (damaged := file.testzip()):  # torch does not compare checksums
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            return saved
        except OSError:
            raise
        except Exception as error:  # zipfile and torch raise many types for damaged files
            raise UserError(
                f"{self.path} is damaged ({first_line(error)}): remove it to train this seed from the start"
            ) from None

    def other_settings(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings of the last state that differ, with both values."""
        saved = self._read(verified=False)
        return {} if saved is None else changed_settings(self.settings, saved["settings"])

    @property
    def steps(self) -> int:
        """Updates until the last state, 0 if there is none."""
        state = self.load(verified=False)
        return 0 if state is None else int(state["updater"]["steps"])

    @property
    def lacks_evaluation(self) -> bool:
        """Whether the last state has updates that are not evaluated, because the training was stopped."""
        state = self.load(verified=False)
        return state is not None and state["updater"]["steps"] > max([0, *(each["steps"] for each in state["epochs"])])


class LossMeter:
    """Adds up losses on the device, and waits for it only when a mean is asked for. Counts the seconds of training."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # rows: log event, evaluation; (loss, weight)
        self.seconds = [0.0, 0.0]  # by row
        self._tokens = 0
        self._counted_at = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time in the block; no other time is counted."""
        self._counted_at = time.monotonic()
        try:
            yield
        finally:
            self._count_seconds()

    def add(self, loss: Loss, tokens: int) -> None:
        """Count an update. tokens: of its sequences."""
        self.sums += torch.stack([loss.sum, loss.weight])
        self._tokens += tokens

    def interval(self) -> dict[str, float]:
        """Return metrics since the last call. Call it while training."""
        loss, tokens = self._mean(0), self._tokens
        self._count_seconds()
        seconds, self.seconds[0], self._tokens = self.seconds[0], 0.0, 0
        return {"loss": loss, "tokens_per_second": tokens / seconds}

    def evaluation(self) -> tuple[float, float]:
        """Return the mean loss, and seconds of training, since the last call."""
        seconds, self.seconds[1] = self.seconds[1], 0.0
        return self._mean(1), seconds

    def load(self, sums: Tensor, seconds: float) -> None:
        """Continue from another meter. seconds: since the last evaluation. The speed is measured anew."""
        self.sums.copy_(sums)
        self.seconds = [0.0, seconds]

    def _mean(self, row: int) -> float:
        loss, weight = self.sums[row].tolist()
        self.sums[row] = 0.0
        return float(loss / weight)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds = [seconds + now - self._counted_at for seconds in self.seconds]
        self._counted_at = now


@dataclass(frozen=True)
class Epoch:
    """The training up to an evaluation."""

    epoch: float  # epochs so far: a whole number at the end of an epoch
    steps: int  # taken so far
    train_loss: float  # mean since the last evaluation, while training
    validation_loss: float | None  # None without a validation split
    scores: dict[str, float]  # on validation; empty without one
    seconds: float  # of training since the last evaluation
    train_scores: dict[str, float] = field(default_factory=dict)  # if `training.score_train` is set


@dataclass(frozen=True)
class Fitted:
    epochs: tuple[Epoch, ...]
    best: Epoch | None  # None without training
    evaluations: Mapping[str, Evaluation]  # with the best weights; of train only if `training.score_train` is set


@dataclass(frozen=True)
class _Best:
    number: int  # of the evaluation, from 0
    weights: dict[str, Tensor]  # on the CPU
    validation: Evaluation | None


def fit(
    model: nn.Module,
    task: PreparedTask,
    config: TrainingConfig,
    seed: int,
    log: Log,
    state_file: StateFile | None = None,
    keep: Callable[[int], None] = lambda steps: None,
) -> Fitted:
    """Train `model` in place. It ends with the weights that are best on validation, the earliest of several equal
    ones, or with the last ones if there is no validation split.

    The seed determines the order of the examples and dropout; the caller seeds the model's head. Continues from
    `state_file`, which is written at each evaluation, and on KeyboardInterrupt before StoppedError is raised. Raises
    DivergedError if the loss or an output is not finite.

    keep: saves the weights of an evaluation; takes the steps so far.
    """
    torch.manual_seed(seed)
    fitting = _Fitting(model, task, config, seed, keep)
    if state_file is not None and (state := state_file.load()) is not None:
        fitting.load_state(state)
    try:
        while not fitting.done:
            fitting.train_until_evaluation(log)
            fitting.evaluate(log)
            if state_file is not None:
                state_file.save(fitting.state())
        return fitting.predict()
    except KeyboardInterrupt:
        if state_file is None:
            raise
        state_file.save(fitting.state())
        raise StoppedError(
            f"stopped: seed {seed} at step {fitting.steps:,}, saved; run the same command again to resume"
        ) from None


def evaluate_untrained(model: nn.Module, task: PreparedTask, config: TrainingConfig) -> Fitted:
    """Predict all splits of a task that is not trained. Raises DivergedError if an output is not finite."""
    model.to(task.device.torch_device)
    use_fast_linear(model)
    microbatch = evaluation_microbatch(config)
    splits = task.splits.items()
    evaluations = {name: evaluate(model, task, split, microbatch) for name, split in splits}
    _check_outputs(evaluations, task)
    return Fitted((), None, evaluations)


def _check_outputs(evaluations: Mapping[str, Evaluation], task: PreparedTask, place: str = "") -> None:
    """Raise DivergedError if outputs are not finite. evaluations: by split. place: in the training."""
    if found := ", ".join(split for split, evaluation in evaluations.items() if not evaluation.is_finite):
        advice = ", or a lower training.lr" if place and task.device.precision != "fp32" else ""
        raise DivergedError(f"{place}{found}: {describe_not_finite(task.device.precision)}{advice}")


class _Fitting:
    """The training with one seed, between two evaluations."""

    def __init__(
        self, model: nn.Module, task: PreparedTask, config: TrainingConfig, seed: int, keep: Callable[[int], None]
    ) -> None:
        self._model, self._task, self._config, self._seed, self._keep = model, task, config, seed, keep
        self._updater = Updater(model, task, config)
        self._meter = LossMeter(task.device.torch_device)
        self._evaluated_at_once = evaluation_microbatch(config)
        self._epochs: list[Epoch] = []
        self._best: _Best | None = None

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self._updater.steps

    @property
    def done(self) -> bool:
        """Whether all steps are taken and evaluated, or `patience` evaluations have brought nothing better."""
        if self._must_evaluate():
            return False
        waited = 0 if self._best is None else len(self._epochs) - 1 - self._best.number
        stop_early = self._config.patience is not None and waited >= self._config.patience
        return stop_early or self._updater.steps >= self._updater.total_steps

    def _must_evaluate(self) -> bool:
        steps, config = self._updater.steps, self._config
        every = steps_per_epoch(self._task, config) if config.evaluate_every == "epoch" else config.evaluate_every
        evaluated = self._epochs[-1].steps if self._epochs else 0
        return steps > evaluated and (steps % every == 0 or steps == self._updater.total_steps)

    def train_until_evaluation(self, log: Log) -> None:
        if self._must_evaluate():  # it was interrupted
            return
        train, updater, config = self._task.splits["train"], self._updater, self._config
        log_every = max(1, updater.total_steps // _EVENTS_PER_SEED)
        lengths = [0] * len(train.examples) if self._task.kind.compares_examples else train.lengths
        self._model.train()
        with self._meter.training():
            for epoch, indices in training_order(lengths, config.batch_size, self._seed, first=updater.steps):
                examples = [train.examples[index] for index in indices]
                with uninterrupted():
                    self._meter.add(updater.step(examples), sum(example.tokens for example in examples))
                    if updater.steps % log_every == 0:
                        interval = self._meter.interval()
                        log(updater.steps, {"seed": self._seed, "epoch": epoch, "lr": updater.lr, **interval})
                        self._check_finite({"train": interval["loss"]})
                if self._must_evaluate():
                    return

    def _check_finite(self, losses: Mapping[str, float]) -> None:
        """Raise DivergedError if a loss is not finite. losses: by split."""
        if not all(map(math.isfinite, losses.values())):
            found = ", ".join(f"{loss:g} on {split}" for split, loss in losses.items())
            place, lr = f"seed {self._seed}, step {self.steps}", self._config.lr
            raise DivergedError(f"{place}: training diverged (loss {found}); try a training.lr below {lr:g}")

    def evaluate(self, log: Log) -> None:
        """Score the validation split, if any; remember the weights if they are the best so far, without one always."""
        validation = self._evaluate("validation") if "validation" in self._task.splits else None
        train = self._evaluate("train") if self._config.score_train else None
        with uninterrupted():
            self._add_evaluation(validation, train, log)
            self._keep(self._updater.steps)

    def _add_evaluation(self, validation: Evaluation | None, train: Evaluation | None, log: Log) -> None:
        train_loss, seconds = self._meter.evaluation()
        loss, scores = (None, {}) if validation is None else (validation.loss, validation.scores)
        steps = self._updater.steps
        epochs = steps / steps_per_epoch(self._task, self._config)
        epoch = int(epochs) if epochs.is_integer() else epochs
        self._check_finite({"train": train_loss} | ({} if loss is None else {"validation": loss}))
        self._epochs.append(Epoch(epoch, steps, train_loss, loss, scores, seconds, train.scores if train else {}))
        evaluations = {"validation": validation, "train": train}
        metrics = {
            f"eval/{split}/{name}": value
            for split, found in evaluations.items()
            if found is not None
            for name, value in {"loss": found.loss, **found.scores}.items()
        }
        if metrics:
            log(steps, {"seed": self._seed, "epoch": epoch, **metrics})
        if self._best is None or not scores or self._task.is_better(scores, self._epochs[self._best.number].scores):
            weights = _copy_to_cpu(self._model, into=None if self._best is None else self._best.weights)
            self._best = _Best(len(self._epochs) - 1, weights, validation)

    def predict(self) -> Fitted:
        """Return the evaluations of all splits, with the best weights."""
        assert self._best is not None
        self._model.load_state_dict(self._best.weights)
        evaluations = {"train": self._evaluate("train")} if self._config.score_train else {}
        evaluations |= {} if self._best.validation is None else {"validation": self._best.validation}
        evaluations |= {name: self._evaluate(name) for name in self._task.splits if name not in ("train", "validation")}
        _check_outputs(evaluations, self._task, f"seed {self._seed}, ")
        return Fitted(tuple(self._epochs), self._epochs[self._best.number], evaluations)

    def _evaluate(self, split: str) -> Evaluation:
        return evaluate(self._model, self._task, self._task.splits[split], self._evaluated_at_once)

    def state(self) -> dict[str, Any]:
        """Return the state for `load_state`. The best weights are left out if they are the present ones."""
        best = self._best
        return {
            "updater": self._updater.state(),
            "losses": self._meter.sums,
            "seconds": self._meter.seconds[1],
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "best": best
            and {
                "number": best.number,
                "weights": None if self._epochs[best.number].steps == self.steps else best.weights,
                "validation": best.validation and vars(best.validation),
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._updater.load_state(state["updater"])
        self._meter.load(state["losses"], state.get("seconds", 0.0))  # version 0.2.0 did not save them
        self._epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        if (best := state["best"]) is None:
            return
        weights = best["weights"] or _copy_to_cpu(self._model, into=None)
        validation = best["validation"] and Evaluation(**best["validation"])
        self._best = _Best(best["number"], weights, validation)


def _copy_to_cpu(model: nn.Module, into: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the weights of a model. into: an earlier copy, whose memory is used again."""
    state = model.state_dict()
    if into is None:
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
    for name, value in state.items():
        into[name].copy_(value)
    return into
