"""The steps since the last log event: their losses, token counts and times.

Each step's loss is reduced separately and added up in step order, so that a run that was stopped within an interval
logs the same figure as one that was not.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.run_files.goodput import CHECKPOINTING, DATA, TRAINING, ActivityTimer
from pretrain.engine.host_copy import read_numbers
from pretrain.modeling.structure import FlopsModel
from pretrain.training.step_agreement import StepTotals
from pretrain.training_progress import TrainingProgress


@dataclass(frozen=True)
class Pace:
    """The training speed of an interval, without evaluations and checkpoints."""

    seconds: float
    tokens_per_second: float
    data_seconds: float  # of `seconds`, spent waiting for data
    checkpoint_seconds: float  # spent waiting for checkpoints, which are no part of `seconds`


class LogInterval:
    """Collects the losses, token counts and times of steps until they are logged."""

    def __init__(self, times: ActivityTimer, device: torch.device) -> None:
        """`times`: of this rank, from which the pace follows. `device`: of the losses."""
        self._times = times
        self._device = device
        self._measured = self._clocks()
        self._clear()

    def _clear(self) -> None:
        self.losses: list[float] = []  # of each step, summed over ranks and masked tokens
        self.masked_tokens = 0
        self._pending: list[Tensor] = []  # this rank's part of further losses, still on the device
        self._totals: list[StepTotals] = []  # of the steps that this process has trained on

    def _clocks(self) -> dict[str, float]:
        """Return the seconds of this process so far, by activity."""
        return {name: self._times.elapsed(name) for name in (TRAINING, DATA, CHECKPOINTING)}

    def restart(self, progress: TrainingProgress) -> None:
        """Begin again with the steps of the interval that an earlier attempt took."""
        self._clear()
        self._measured = {**self._clocks(), CHECKPOINTING: self._measured[CHECKPOINTING]}
        self.losses, self.masked_tokens = list(progress.interval_losses), progress.interval_masked

    def add(self, losses: Tensor | None, totals: StepTotals) -> None:
        """Add a step. `losses`: of this rank's microbatches; None for a step that was not trained on."""
        if losses is not None:
            self._totals.append(totals)
            self._pending.append(losses.sum(dtype=torch.float64))
            self.masked_tokens += totals.masked_tokens

    def include_in(self, progress: TrainingProgress) -> TrainingProgress:
        """Return the progress with the losses of this interval. Waits for the device. Collective."""
        self._all_reduce_losses()
        return replace(progress, interval_losses=tuple(self.losses), interval_masked=self.masked_tokens)

    def end(self, progress: TrainingProgress) -> TrainingProgress:
        """Return the progress with the losses of this interval and of earlier ones. The next interval begins."""
        included = self.include_in(progress)
        self._clear()
        loss_sum, masked_tokens = included.trained
        return replace(included, loss_sum=loss_sum, masked_tokens=masked_tokens, interval_losses=(), interval_masked=0)

    def mean_loss(self) -> float | None:
        """Return the loss per masked token; None if no step was trained on. Waits for the device. Collective."""
        self._all_reduce_losses()
        return sum(self.losses) / self.masked_tokens if self.masked_tokens else None

    def _all_reduce_losses(self) -> None:
        """Copy all losses to the host: the interval's only wait for the device."""
        if self._pending:
            summed = torch.stack([loss.to(self._device, torch.float64) for loss in self._pending])
            dist.all_reduce(summed)
            self.losses += read_numbers(summed)
            self._pending.clear()

    def measure_pace(self) -> Pace:
        """Return the pace of the interval. Time from now on, such as for logging, belongs to the next one."""
        before, self._measured = self._measured, self._clocks()
        training, data, checkpointing = (now - before[name] for name, now in self._measured.items())
        seconds = max(training + data, 1e-9)
        tokens = sum(step.tokens for step in self._totals)
        return Pace(seconds, tokens / seconds, data, checkpointing)

    def flops(self, model: FlopsModel) -> float:
        """Count the FLOPs of the steps that this process has trained on, over all ranks."""
        return sum(model.per_step(step.tokens, step.squared_lengths, step.masked_tokens) for step in self._totals)
