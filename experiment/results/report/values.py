"""Values of log events, and how tables show them."""

import statistics
from collections.abc import Sequence

from experiment.tracking.jsonl import Event

UNKNOWN = "–"


def curve(events: Sequence[Event], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the events in which `key` is a number."""
    points = [(event["step"], event[key]) for event in events if type(event.get(key)) in (int, float)]
    return [step for step, _ in points], [value for _, value in points]


def median(events: Sequence[Event], key: str) -> float | None:
    values = curve(events, key)[1]
    return statistics.median(values) if values else None


def show(value: float | None, spec: str) -> str:
    return UNKNOWN if value is None else format(value, spec)


def evaluated_corpora(events: Sequence[Event]) -> list[str]:
    """Names of the held-out corpora, in the order of their first evaluation."""
    keys = [key for event in events for key in event if key.startswith("eval/")]
    return list(dict.fromkeys(key.removeprefix("eval/").rsplit("/", 1)[0] for key in keys))


def best_loss(events: Sequence[Event], corpus: str) -> tuple[float, int] | None:
    """The lowest loss on a held-out corpus, and its step; None without any."""
    steps, losses = curve(events, f"eval/{corpus}/loss")
    return min(zip(losses, steps, strict=True), default=None)
