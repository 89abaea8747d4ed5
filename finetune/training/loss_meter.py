"""Mean training loss and throughput since the last log event, and over the epoch."""

import time

import torch

from finetune.task_kind import Loss


class LossMeter:
    """Adds up losses on the device, and waits for it only when a mean is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # rows: interval, epoch; (loss, weight)
        self._tokens = 0
        self._started = [time.monotonic()] * 2

    def add(self, loss: Loss, tokens: int) -> None:
        """Count an update. tokens: of its sequences."""
        self._sums += torch.stack([loss.sum, loss.weight])
        self._tokens += tokens

    def interval(self) -> dict[str, float]:
        """Metrics since the last call."""
        loss, weight = self._sums[0].tolist()
        now = time.monotonic()
        metrics = {"loss": loss / weight, "tokens_per_second": self._tokens / (now - self._started[0])}
        self._sums[0] = 0.0
        self._tokens, self._started[0] = 0, now
        return metrics

    def epoch(self) -> tuple[float, float]:
        """Mean loss, seconds."""
        loss, weight = self._sums[1].tolist()
        return loss / weight, time.monotonic() - self._started[1]
