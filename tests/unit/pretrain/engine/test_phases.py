import pytest

from pretrain.engine import phases
from pretrain.engine.phases import ForwardTimer


class Event:
    """Stands for a CUDA event: done when the test says so."""

    now = 0.0  # milliseconds
    done = 0.0  # how far the device is

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.done

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "CUDA would raise an error"
        return end.at - self.at


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a read of a time that the device does not know yet, and one that is lost or counted twice."""
    monkeypatch.setattr(phases, "_event", Event)
    timer = ForwardTimer(on_gpu=True, ranks=2)
    for _ in range(3):
        with timer.measuring():
            Event.now += 20.0
        Event.now += 5.0
    Event.done = 50.0
    assert timer.take() == pytest.approx(0.04)
    assert timer.take() == 0.0
    Event.done = 100.0
    assert timer.take() == pytest.approx(0.02)


def test_passes_on_a_cpu_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pretrain.engine.phases.time.perf_counter", lambda: now)
    timer = ForwardTimer(on_gpu=False, ranks=2)
    for _ in range(3):
        with timer.measuring():
            now += 0.5
        now += 0.1
    assert timer.take() == 1.5
    assert timer.take() == 0.0


def test_a_single_rank_keeps_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches events that nobody takes, and that fill the memory over a long run."""
    created: list[Event] = []
    monkeypatch.setattr(phases, "_event", lambda: created.append(Event()) or created[-1])
    timer = ForwardTimer(on_gpu=True, ranks=1)
    with timer.measuring():
        pass
    assert not created
