from collections.abc import Iterable

import pytest
import torch

from pretrain.modeling.structure import FlopsModel
from pretrain.training.log_interval import LogInterval
from pretrain.training.step_agreement import StepTotals

CPU = torch.device("cpu")
# Losses of each step's microbatches, and its masked tokens over all ranks; None: a step that was not trained on.
STEPS: list[tuple[list[float] | None, int]] = [
    ([0.1, 0.7], 3),
    ([1e-3, 1.3], 5),
    (None, 4),
    ([2.1, 0.3], 2),
    ([0.9], 1),
]


@pytest.fixture(autouse=True)
def two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has the same losses."""
    monkeypatch.setattr("pretrain.training.log_interval.dist.all_reduce", lambda summed: summed.mul_(2))


def totals(masked_tokens: int, tokens: int = 0, squared_lengths: int = 0) -> StepTotals:
    return StepTotals(masked_tokens, tokens, squared_lengths, 0, 0, 0, 0, 0, ())


def add_steps(interval: LogInterval, steps: Iterable[tuple[list[float] | None, int]]) -> LogInterval:
    for losses, masked_tokens in steps:
        interval.add(None if losses is None else torch.tensor(losses), totals(masked_tokens))
    return interval


def test_mean_loss_is_per_masked_token_of_all_ranks() -> None:
    """Catches a mean over steps or microbatches, one rank's share, and masked tokens of steps that were skipped."""
    interval = add_steps(LogInterval(), STEPS)
    interval.all_reduce_losses(CPU)
    assert interval.masked_tokens == 11
    assert interval.mean_loss == pytest.approx(2 * (0.1 + 0.7 + 1e-3 + 1.3 + 2.1 + 0.3 + 0.9) / 11)


@pytest.mark.parametrize("stop_after", range(len(STEPS) + 1))
def test_resumed_interval_logs_the_same_loss(stop_after: int) -> None:
    """Catches steps before a stop that a resume drops or counts twice, and sums in another order: not a bit differs."""
    uninterrupted = add_steps(LogInterval(), STEPS)
    uninterrupted.all_reduce_losses(CPU)
    before = add_steps(LogInterval(), STEPS[:stop_after])
    before.all_reduce_losses(CPU)
    resumed = add_steps(LogInterval(tuple(before.losses), before.masked_tokens), STEPS[stop_after:])
    resumed.all_reduce_losses(CPU)
    assert resumed.losses == uninterrupted.losses
    assert resumed.mean_loss == uninterrupted.mean_loss


def test_reducing_twice_changes_nothing() -> None:
    """Catches losses that an evaluation or a save within the interval reduces, and the log event reduces again."""
    once, twice = add_steps(LogInterval(), STEPS), add_steps(LogInterval(), STEPS[:2])
    twice.all_reduce_losses(CPU)
    twice.all_reduce_losses(CPU)
    add_steps(twice, STEPS[2:])
    for interval in (once, twice):
        interval.all_reduce_losses(CPU)
    assert once.losses == twice.losses


def test_interval_without_a_trained_step_has_no_loss() -> None:
    """Catches a division by zero where every batch of an interval was skipped."""
    interval = add_steps(LogInterval(), [(None, 4)])
    interval.all_reduce_losses(CPU)
    assert interval.mean_loss is None


def test_flops_are_of_the_steps_of_this_process() -> None:
    """Catches an MFU that counts steps of an earlier attempt, whose time is not measured here."""
    model = FlopsModel(encoder_parameters=1000, hidden_size=4, vocabulary=50, windows=(None, 9))
    interval = LogInterval(losses=(7.0, 8.0), masked_tokens=20)
    for step in (totals(3, 40, 500), totals(0, 10, 100)):
        interval.add(None, step)
    assert interval.flops(model) == model.per_step(40, 500, 3) + model.per_step(10, 100, 0)
