"""The steps since the last log event: their losses and token counts.

Each step's loss is reduced separately and added up in step order, so that a run that was stopped within an interval
logs the same figure as one that was not.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.modeling.structure import FlopsModel
from pretrain.training.step_agreement import StepTotals


class LogInterval:
    def __init__(self, losses: tuple[float, ...] = (), masked_tokens: int = 0) -> None:
        """`losses`, `masked_tokens`: of the steps in the interval that an earlier attempt took."""
        self.losses = list(losses)  # of each step, summed over ranks and masked tokens
        self.masked_tokens = masked_tokens
        self._pending: list[Tensor] = []  # this rank's part of further losses, still on the device
        self._totals: list[StepTotals] = []  # of the steps that this process took

    def add(self, losses: Tensor | None, totals: StepTotals) -> None:
        """`losses`: of this rank's microbatches; None for a step that was not trained on."""
        self._totals.append(totals)
        if losses is not None:
            self._pending.append(losses.sum(dtype=torch.float64))
            self.masked_tokens += totals.masked_tokens

    def all_reduce_losses(self, device: torch.device) -> None:
        """Copy all losses to the host: the interval's only wait for the device. Collective."""
        if self._pending:
            summed = torch.stack([loss.to(device, torch.float64) for loss in self._pending])
            dist.all_reduce(summed)
            self.losses += summed.tolist()
            self._pending.clear()

    @property
    def loss_sum(self) -> float:
        """Sum of the losses of all masked tokens, over the steps whose losses `all_reduce_losses` has reduced."""
        return sum(self.losses)

    @property
    def mean_loss(self) -> float | None:
        """Per masked token; None if no step was trained on."""
        return self.loss_sum / self.masked_tokens if self.masked_tokens else None

    def flops(self, model: FlopsModel) -> float:
        """FLOPs of the steps that this process took part in, over all ranks."""
        return sum(model.per_step(step.tokens, step.squared_lengths, step.masked_tokens) for step in self._totals)
