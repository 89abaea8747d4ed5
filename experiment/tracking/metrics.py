"""The type of what a run logs."""

from collections.abc import Mapping

# One event: flat keys, null where a value is unknown. Every event has `step`, the number of finished steps.
Metrics = Mapping[str, int | float | str | None]

SLOW_RATIO = 1.5
"""A rank that takes so many times as long as the median rank is slow."""
