from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.batching.order import BatchSequences
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.step_agreement import StepAgreement, StepTotals, TrainingClock
from pretrain.world import World

MASKED, TOKENS, SQUARED = (5, 30, 200), (9, 70, 800), (0, 2, 4)  # of three ranks


class RecordedGroup:
    """In place of the process group: keeps what each rank contributes."""

    def __init__(self) -> None:
        self.contributions: list[list[int]] = []

    def start_all_reduce_sum(self, numbers: Sequence[int]) -> Any:
        self.contributions.append(list(numbers))
        return lambda: [sum(column) for column in zip(*self.contributions, strict=True)]


def rank_batch(masked: int, tokens: int, squared_lengths: int) -> RankBatch:
    nothing = np.zeros(0, dtype=np.int64)
    origins = BatchSequences(*[nothing] * len(BatchSequences._fields))
    return RankBatch(0, [], masked, tokens, squared_lengths, [tokens - 1, 1], origins, 0)


def agree(monkeypatch: pytest.MonkeyPatch, save_minutes: float | None, asked: tuple[str | None, ...]) -> StepTotals:
    """The totals of three ranks whose clocks disagree: 100, 170 and 240 seconds of training, as long since a save."""
    now = 0.0
    monkeypatch.setattr("pretrain.training.step_agreement.time.monotonic", lambda: now)
    group: Any = RecordedGroup()
    for rank, reason in enumerate(asked):
        now = 0.0
        clock = TrainingClock(0.0)
        now = 100.0 + 70.0 * rank
        agreement = StepAgreement(cast(CpuGroup, group), World(rank, 3), clock, save_minutes, corpora=2)
        batch = rank_batch(MASKED[rank], TOKENS[rank], SQUARED[rank])
        pending = agreement.begin(batch, stop_requested=reason is not None, part_done=rank > 0)
    return pending.wait()


def test_totals_are_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numbers that change places on the way, and corpora that are mixed up."""
    totals = agree(monkeypatch, None, (None, None, None))
    assert (totals.masked_tokens, totals.tokens, totals.squared_lengths) == (235, 879, 6)
    assert totals.corpus_tokens == (876, 3)
    assert (totals.stop_requests, totals.save_requests, totals.ranks_done) == (0, 0, 2)


def test_time_is_that_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches clocks that are added up, or a budget that each rank measures for itself."""
    assert agree(monkeypatch, None, (None, None, None)).seconds == 100.0


@pytest.mark.parametrize(("save_minutes", "requests"), [(None, 0), (1.0, 1), (2.0, 0)])
def test_saves_are_due_by_the_clock_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, save_minutes: float | None, requests: int
) -> None:
    """Catches a save that only some ranks start, and seconds compared with minutes."""
    assert agree(monkeypatch, save_minutes, (None, None, None)).save_requests == requests


@pytest.mark.parametrize(("asked", "requests"), [((None, None, "signal"), 1), (("STOP", "signal", None), 2)])
def test_any_rank_can_request_a_stop(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str | None, ...], requests: int
) -> None:
    """Catches a signal to a rank other than 0 that is ignored."""
    assert agree(monkeypatch, None, asked).stop_requests == requests


def test_a_rank_without_a_batch_contributes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that send different numbers of sums where the data of one has failed: the others would hang."""
    group: Any = RecordedGroup()
    agreement = StepAgreement(cast(CpuGroup, group), World(0, 2), TrainingClock(0.0), None, corpora=2)
    agreement.begin(rank_batch(5, 9, 0), stop_requested=False, part_done=True)
    totals = agreement.begin(None, stop_requested=True, part_done=True).wait()
    assert (totals.masked_tokens, totals.tokens, totals.corpus_tokens) == (5, 9, (8, 1))
    assert (totals.stop_requests, totals.failed_batches) == (1, 0)
    totals = agreement.begin(DataWorkerError("killed"), stop_requested=False, part_done=False).wait()
    assert (totals.masked_tokens, totals.tokens, totals.corpus_tokens) == (5, 9, (8, 1))
    assert (totals.stop_requests, totals.failed_batches) == (1, 1)


def test_training_time_covers_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resumed run that starts its time budget over, and a save that resets the training time."""
    now = 1000.0
    monkeypatch.setattr("pretrain.training.step_agreement.time.monotonic", lambda: now)
    clock = TrainingClock(seconds_before=50.0)
    assert (clock.seconds, clock.minutes_since_save) == (50.0, 0.0)
    now += 90.0
    assert (clock.seconds, clock.minutes_since_save) == (140.0, 1.5)
    clock.restart_save_timer()
    now += 30.0
    assert (clock.seconds, clock.minutes_since_save) == (170.0, 0.5)
