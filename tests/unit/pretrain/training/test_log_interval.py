from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch

from experiment.run_files.goodput import CHECKPOINTING, DATA, EVALUATING, ActivityTimer
from pretrain.modeling.structure import FlopsModel
from pretrain.training.log_interval import LogInterval, Pace
from pretrain.training.step_agreement import StepTotals
from pretrain.training_progress import TrainingProgress

CPU = torch.device("cpu")
TRAINED = torch.tensor([0.5])  # losses of a step
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


def new_interval(progress: TrainingProgress | None = None, times: ActivityTimer | None = None) -> LogInterval:
    interval = LogInterval(times or ActivityTimer(0.0), CPU)
    interval.restart(progress or TrainingProgress())
    return interval


def add_steps(interval: LogInterval, steps: Iterable[tuple[list[float] | None, int]]) -> LogInterval:
    for losses, masked_tokens in steps:
        interval.add(None if losses is None else torch.tensor(losses), totals(masked_tokens))
    return interval


def test_mean_loss_is_per_masked_token_of_all_ranks() -> None:
    """Catches a mean over steps or microbatches, one rank's share, and masked tokens of steps that were skipped."""
    interval = add_steps(new_interval(), STEPS)
    assert interval.masked_tokens == 11
    assert interval.mean_loss() == pytest.approx(2 * (0.1 + 0.7 + 1e-3 + 1.3 + 2.1 + 0.3 + 0.9) / 11)


@pytest.mark.parametrize("stop_after", range(len(STEPS) + 1))
def test_resumed_interval_logs_the_same_loss(stop_after: int) -> None:
    """Catches steps before a stop that a resume drops or counts twice, and sums in another order: not a bit differs."""
    uninterrupted = add_steps(new_interval(), STEPS)
    saved = add_steps(new_interval(), STEPS[:stop_after]).include_in(TrainingProgress())
    resumed = add_steps(new_interval(saved), STEPS[stop_after:])
    assert resumed.mean_loss() == uninterrupted.mean_loss()
    assert resumed.losses == uninterrupted.losses


def test_reducing_twice_changes_nothing() -> None:
    """Catches losses that an evaluation or a save within the interval reduces, and the log event reduces again."""
    once, twice = add_steps(new_interval(), STEPS), add_steps(new_interval(), STEPS[:2])
    twice.mean_loss()
    twice.mean_loss()
    add_steps(twice, STEPS[2:])
    assert once.mean_loss() == twice.mean_loss()
    assert once.losses == twice.losses


def test_the_end_of_an_interval_moves_its_losses_to_the_run() -> None:
    """Catches losses that a run forgets or counts twice: evaluations compare the training loss between them."""
    interval = add_steps(new_interval(), STEPS[:2])
    before = interval.include_in(TrainingProgress(loss_sum=5.0, masked_tokens=7))
    after = interval.end(before)
    assert before.trained == after.trained == (after.loss_sum, 7 + 8)
    assert (after.interval_losses, after.interval_masked, interval.losses, interval.mean_loss()) == ((), 0, [], None)


def test_interval_without_a_trained_step_has_no_loss() -> None:
    """Catches a division by zero where every batch of an interval was skipped."""
    interval = add_steps(new_interval(), [(None, 4)])
    assert interval.mean_loss() is None


def test_flops_are_of_the_steps_that_this_process_trained_on() -> None:
    """Catches an MFU that counts steps of an earlier attempt, whose time is not measured here, or batches that a rewind
    skips, which take no time."""
    model = FlopsModel(encoder_parameters=1000, hidden_size=4, vocabulary=50, decoder_width=4, windows=(None, 9))
    interval = new_interval(TrainingProgress(interval_losses=(7.0, 8.0), interval_masked=20))
    for step in (totals(3, 40, 500), totals(0, 10, 100)):
        interval.add(TRAINED, step)
    interval.add(None, totals(4, 60, 900))
    assert interval.flops(model) == model.per_step(40, 500, 3) + model.per_step(10, 100, 0)


def test_pace_is_of_one_interval() -> None:
    """Catches figures that leak from one interval into the next, evaluations and checkpoints that lower tokens per
    second, skipped batches that raise it, compiling that does not, and a division by zero on a coarse clock."""
    at = SimpleNamespace(now=100.0, compiled=0.0)
    times = ActivityTimer(0.0, lambda: at.compiled, clock=lambda: at.now)
    at.now += 50.0  # starting
    interval = new_interval(times=times)
    times.begin_training()
    assert interval.measure_pace() == Pace(1e-9, 0.0, 0.0, 0.0)
    for _ in range(2):
        with times.during(DATA):
            at.now += 1.0
        at.now, at.compiled = at.now + 3.0, at.compiled + 2.0
        interval.add(TRAINED, totals(0, 500))
        with times.during(EVALUATING):
            at.now += 10.0
        with times.during(CHECKPOINTING):
            at.now += 1.5
    assert interval.measure_pace() == Pace(8.0, 125.0, 2.0, 3.0)
    interval.end(TrainingProgress())
    at.now += 2.0
    interval.add(TRAINED, totals(0, 10))
    interval.add(None, totals(0, 700))  # skipped
    assert interval.measure_pace() == Pace(2.0, 5.0, 0.0, 0.0)
