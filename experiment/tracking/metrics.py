"""The type of what a run logs."""

from collections.abc import Mapping

# One event: flat keys, null where a value is unknown. Every event has `step`, the number of finished steps.
Metrics = Mapping[str, int | float | str | None]

SLOW_RATIO = 1.5
"""A rank that takes so many times as long as the median rank is slow."""


def format_perplexity(value: float | None) -> str:
    """With four digits or more: '8,448', '66.60' or '3.971'; '–' for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 999.95 <= value < 1e7 else f"{value:#.4g}"
