from types import SimpleNamespace
from typing import Any

from pretrain.engine.phases import PREFIX
from pretrain.training.profiler import _cpu_communication


def event(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_time_in_which_several_collectives_are_in_flight_counts_once() -> None:
    """Catches a share of communication that adds up sends and receives, or counts the agreement on the next batch,
    which is in flight while the step is computed."""
    phases = [event(PREFIX + "forward", 2, 50), event(PREFIX + "reduce gradients", 50, 80)]
    waiting = event(PREFIX + "wait for ranks", 90, 95)
    agreement = event("gloo:all_reduce", 1, 94)
    sent = [event("gloo:recv", 60, 70), event("gloo:send", 55, 65), event("gloo:send", 72, 75)]
    computed = event("aten::mm", 50, 80)
    assert _cpu_communication([*phases, waiting, agreement, *sent, computed], [*phases, waiting]) == 15 + 3 + 5
