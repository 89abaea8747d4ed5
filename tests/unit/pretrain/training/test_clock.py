import pytest

from pretrain.training.clock import TrainingClock


def test_training_time_covers_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resumed run that starts its time budget over, and a save that resets the training time."""
    now = 1000.0
    monkeypatch.setattr("pretrain.training.clock.time.monotonic", lambda: now)
    clock = TrainingClock(seconds_before=50.0)
    assert (clock.seconds, clock.minutes_since_save) == (50.0, 0.0)
    now += 90.0
    assert (clock.seconds, clock.minutes_since_save) == (140.0, 1.5)
    clock.restart_save_timer()
    now += 30.0
    assert (clock.seconds, clock.minutes_since_save) == (170.0, 0.5)
