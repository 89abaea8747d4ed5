"""Mean training loss and throughput since the last log event, and since the last evaluation."""

import time

import torch
from torch import Tensor

from finetune.task_kind import Loss


class LossMeter:
    """Adds up losses on the device, and waits for it only when a mean is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # rows: log event, evaluation; (loss, weight)
        self._tokens = 0
        self._started = [time.monotonic()] * 2

    def add(self, loss: Loss, tokens: int) -> None:
        """Count an update. tokens: of its sequences."""
        self.sums += torch.stack([loss.sum, loss.weight])
        self._tokens += tokens

    def interval(self) -> dict[str, float]:
        """Metrics since the last call."""
        tokens, self._tokens = self._tokens, 0
        loss, seconds = self._read(0)
        return {"loss": loss, "tokens_per_second": tokens / seconds}

    def evaluation(self) -> tuple[float, float]:
        """Mean loss and seconds since the last call, or since `skip_time`."""
        return self._read(1)

    def skip_time(self) -> None:
        """The time up to now was not for training."""
        self._started[1] = time.monotonic()

    def load(self, sums: Tensor) -> None:
        """Continue from the `sums` of another meter."""
        self.sums.copy_(sums)

    def _read(self, row: int) -> tuple[float, float]:
        loss, weight = self.sums[row].tolist()
        now = time.monotonic()
        seconds = now - self._started[row]
        self.sums[row], self._started[row] = 0.0, now
        return loss / weight, seconds
