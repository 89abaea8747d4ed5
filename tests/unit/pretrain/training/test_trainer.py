import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from experiment.goodput import ActivityTimer
from experiment.outcome_file import Outcome
from experiment.tracking import Trackers
from experiment.tracking.tracker import CLOSE_SECONDS
from pretrain.config import EvaluationConfig
from pretrain.training import trainer as trainer_module
from pretrain.training.early_stopping import EvaluationHistory
from pretrain.training.trainer import Trainer


def test_mfu_is_unknown_for_a_model_with_unknown_flops() -> None:
    """Catches a run on a GPU that stops at its first log line because of a figure that cannot be computed."""
    trainer: Any = SimpleNamespace(_on_gpu=True, _flops=None)
    assert Trainer._mfu(trainer, seconds=1.0) is None


@pytest.mark.parametrize(
    ("best", "step", "found"), [(None, None, "it was never finite"), (2.34567, 40, "the best was 2.346 at step 40")]
)
def test_the_reason_of_an_early_stop_is_logged(
    caplog: pytest.LogCaptureFixture, best: float | None, step: int | None, found: str
) -> None:
    """Catches a traceback on stderr in place of the reason if the metric was never finite."""
    metric = "eval/test/loss"
    history = EvaluationHistory(metric, best, step, waited=2)
    config = SimpleNamespace(evaluation=EvaluationConfig(best_metric=metric, patience=2))
    trainer: Any = SimpleNamespace(_progress=SimpleNamespace(evaluations=history), _config=config)
    with caplog.at_level("INFO"):
        Trainer._log_early_stop(trainer)
    assert caplog.messages == [f"stopping early: {metric} has not improved for 2 evaluations; {found}"]


@pytest.fixture
def stuck_trackers() -> Iterator[Trackers]:
    """Trackers that wait for a disk that does not answer when they are closed."""
    answered = threading.Event()
    tracker: Any = SimpleNamespace(close=lambda _: answered.wait())
    yield Trackers({"metrics.jsonl": lambda: tracker})
    answered.set()


def closing_trainer(trackers: Trackers, wait_for_all: Callable[..., None]) -> Any:
    trainer: Any = SimpleNamespace(_tracker=trackers, _profiler=None, _times=ActivityTimer(0.0))
    trainer._close_tracker = lambda outcome: Trainer._close_tracker(trainer, outcome)
    trainer._group = SimpleNamespace(wait_for_all=wait_for_all)
    return trainer


def test_trackers_that_never_close_are_stuck(stuck_trackers: Trackers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that wait forever for the trackers of rank 0, and slow servers that count as stuck."""
    seconds = [0.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    made: list[bool] = []

    def wait_for_all(closing: "Future[None]", made_progress: Callable[[], bool]) -> None:
        for seconds[0] in (1.0, CLOSE_SECONDS - 1, CLOSE_SECONDS + 1):
            made.append(made_progress())
        assert not closing.done()
        raise TimeoutError

    with pytest.raises(TimeoutError):
        Trainer.close(closing_trainer(stuck_trackers, wait_for_all), Outcome.DONE)
    assert made == [True, True, False]


def test_trackers_that_never_close_do_not_hide_a_failure(
    stuck_trackers: Trackers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that has failed and stays, or reports the trackers in place of the failure."""
    monkeypatch.setattr(trainer_module, "CLOSE_SECONDS", 0.01)
    Trainer.close(closing_trainer(stuck_trackers, lambda *_: None), Outcome.FAILED)
