import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiment.run_files.goodput import CHECKPOINTING, DATA, ActivityTimer
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.progress_line import describe_training
from experiment.tracking.tracker import CLOSE_SECONDS, Trackers
from pretrain.training import reporter as reporter_module
from pretrain.training.log_interval import LogInterval
from pretrain.training.reporter import CheckpointAlarm, Reporter, SlowRanks
from pretrain.training_progress import TrainingProgress
from pretrain.world import World

NODES = ["node-0", "node-0", "node-1", "node-1"]


def test_mfu_is_unknown_for_a_model_with_unknown_flops() -> None:
    """Catches a run on a GPU that stops at its first log line because of a figure that cannot be computed."""
    stub: Any = SimpleNamespace(engine=SimpleNamespace(device=SimpleNamespace(type="cuda")), flops=None)
    assert Reporter._mfu(stub, seconds=1.0) is None


def test_the_figures_of_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an MFU of one of the ranks, and times that change places."""
    monkeypatch.setattr(reporter_module.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(reporter_module, "peak_flops", lambda *_: 100.0)
    now = 0.0
    times = ActivityTimer(0.0, clock=lambda: now)
    interval = LogInterval(times, torch.device("cpu"))
    interval.flops = lambda _: 160.0  # type: ignore[method-assign]
    times.begin_training()
    now += 6.0
    for activity, seconds in ((DATA, 2.0), (CHECKPOINTING, 3.0)):
        with times.during(activity):
            now += seconds
    engine: Any = SimpleNamespace(
        world=World(rank=0, size=2),
        device=SimpleNamespace(type="cuda"),
        precision="bf16",
        loss_scale=None,
        forward_timer=SimpleNamespace(enabled=False),
    )
    alerts = SimpleNamespace(no_checkpoint_hours=1.0)
    run: Any = SimpleNamespace(
        folder=RunFolder(tmp_path), config=SimpleNamespace(tracking=SimpleNamespace(alerts=alerts))
    )
    events: list[Any] = []
    tracker: Any = SimpleNamespace(log=events.append)
    flops: Any = object()
    figures = Reporter(run, flops, engine, interval, times, NODES, tracker)
    figures.report(TrainingProgress(step=1), rate=1e-3, grad_norm=0.5, saved_step=None)
    assert (events[0]["data_wait"], events[0]["checkpoint_seconds"], events[0]["mfu"]) == (0.25, 3.0, 0.1)


@pytest.fixture
def stuck_trackers() -> Iterator[Trackers]:
    """Trackers that wait for a disk that does not answer when they are closed."""
    answered = threading.Event()
    tracker: Any = SimpleNamespace(close=lambda _: answered.wait())
    yield Trackers({"metrics.jsonl": lambda: tracker})
    answered.set()


def reporter(trackers: Trackers) -> Any:
    stub: Any = SimpleNamespace(tracker=trackers)
    stub._close_tracker = lambda outcome, step: Reporter._close_tracker(stub, outcome, step)
    return stub


def test_trackers_that_never_close_are_stuck(stuck_trackers: Trackers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that wait forever for the trackers of rank 0, and slow servers that count as stuck."""
    seconds = [0.0]
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    made: list[bool] = []

    def wait_for_all(closing: "Future[None]", made_progress: Callable[[], bool]) -> None:
        for seconds[0] in (1.0, CLOSE_SECONDS - 1, CLOSE_SECONDS + 1):
            made.append(made_progress())
        assert not closing.done()
        raise TimeoutError

    group: Any = SimpleNamespace(wait_for_all=wait_for_all)
    with pytest.raises(TimeoutError):
        Reporter.close(reporter(stuck_trackers), Outcome.DONE, 1, group)
    assert made == [True, True, False]


def test_trackers_that_never_close_do_not_hide_a_failure(
    stuck_trackers: Trackers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that has failed and stays, or reports the trackers in place of the failure."""
    monkeypatch.setattr(reporter_module, "CLOSE_SECONDS", 0.01)
    group: Any = SimpleNamespace(wait_for_all=lambda *_: None)
    Reporter.close(reporter(stuck_trackers), Outcome.FAILED, 1, group)


def test_the_slowest_rank_is_found() -> None:
    """Catches a rank that is compared with itself: of two ranks, the median is the faster one."""
    ranks = SlowRanks(NODES)
    assert ranks.update([100, 110, 90, 105]) == (1, 1.1)
    assert ranks.update([100, 100, 100, 250]) == (3, 2.5)
    assert SlowRanks(["a", "b"]).update([100, 300]) == (1, 3.0)
    assert ranks.update([0, 0, 0, 0]) is None
    assert ranks.update([100, 100, 0, 250]) is None, "no rank is slow while the time of one is unknown"


def test_a_rank_that_stays_slow_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning for a single slow interval, and one for each of a thousand."""
    ranks = SlowRanks(NODES)
    for _ in range(4):
        ranks.update([100, 100, 180, 100])
    ranks.update([100, 100, 100, 180])
    for _ in range(4):
        ranks.update([100, 100, 180, 100])
    assert caplog.messages == []
    for _ in range(20):
        ranks.update([100, 100, 180, 100])
    assert [record.getMessage() for record in caplog.records] == [
        "node-1, rank 2 is slow: its forward passes and waits for data took 1.8 times the median of all ranks, and at "
        "least 1.5 times in each of the last 5 log intervals"
    ]


def test_a_slow_rank_is_shown() -> None:
    """Catches a progress line that names a rank although all are equally fast."""
    event = {"loss": 2.0, "slowest_rank": 2, "slowest_rank_ratio": 1.2}
    assert describe_training(event) == "loss 2.0000"
    slow = "loss 2.0000 · rank 2 takes 1.8 × the median time"
    assert describe_training(event | {"slowest_rank_ratio": 1.8}) == slow


def test_an_alarm_is_raised_after_hours_without_a_new_checkpoint() -> None:
    """Catches an alert although checkpoints are saved, none although they are not, and one at every log event."""
    now = 0.0
    alarm = CheckpointAlarm(2.0, lambda: now)
    messages = []
    for hour, saved_step in (
        (0.0, 100),
        (1.5, 100),
        (1.9, 200),
        (3.8, 200),
        (3.9, 200),
        (5.0, 200),
        (5.9, 200),
        (6, 300),
    ):
        now = hour * 3600
        if (message := alarm.check(saved_step)) is not None:
            messages.append((hour, message))
    assert messages == [
        (3.9, "no checkpoint was saved for 2.0 hours; the newest is of step 200"),
        (5.9, "no checkpoint was saved for 4.0 hours; the newest is of step 200"),
    ]


def test_the_first_checkpoint_may_be_missing() -> None:
    """Catches a first checkpoint that never comes and is not missed."""
    now = 0.0
    alarm = CheckpointAlarm(0.5, lambda: now)
    assert alarm.check(None) is None
    now = 1800.0
    assert alarm.check(None) == "no checkpoint was saved for 0.5 hours; there is none"
