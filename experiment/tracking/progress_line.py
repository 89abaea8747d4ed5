"""The run on the terminal: a progress bar above the latest values if stderr is interactive, plain lines otherwise.

The log of rank 0 gets the plain lines in both cases.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from experiment.formatting import UNKNOWN, describe_duration, format_perplexity
from experiment.progress import terminal
from experiment.run_files.metrics_file import SLOW_RATIO, Metrics
from experiment.run_files.outcome_file import Outcome

PROGRESS_LOG = "experiment.progress"
"""Name of the logger whose messages are not printed: the terminal shows them already."""
RATE_EVENTS = 20  # log events over which the speed of training is estimated

_log = logging.getLogger(PROGRESS_LOG)


class TimedStep(NamedTuple):
    """A log event."""

    seconds: float  # by any clock
    step: int
    paused: float  # seconds of evaluations and checkpoints so far


def estimate_left(events: Sequence[TimedStep], total: int | None) -> float | None:
    """Return the time left at the speed of the last events, with evaluations and checkpoints as often and as long as
    so far.

    events: the first one of an attempt, and its last ones.
    """
    # The last one of each step; after a rewind, a step has two.
    known = [event for event, after in pairwise(events) if after.step != event.step] + list(events[-1:])
    if total is None or not known:
        return None
    first, start, last = known[0], known[-RATE_EVENTS:][0], known[-1]
    training = last.seconds - start.seconds - (last.paused - start.paused)
    if not first.step <= start.step < last.step or training <= 0:  # the clock was set back
        return None
    per_step = training / (last.step - start.step) + (last.paused - first.paused) / (last.step - first.step)
    return max(0, total - last.step) * per_step


class ConsoleTracker:
    """Shows training events as a progress bar, or as one line each without a terminal; prints evaluations as lines.

    total_steps: None if the last step is not known. seconds_left: of a time budget. rate_events: the last events, over
    which the speed of training is estimated; None: all. paused: returns the seconds of evaluations and checkpoints so
    far. clock: returns seconds, for the estimate.
    """

    def __init__(
        self,
        total_steps: int | None,
        resumed_step: int = -1,
        seconds_left: float | None = None,
        rate_events: int | None = RATE_EVENTS,
        paused: Callable[[], float] = float,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total = total_steps
        self._console = console or terminal()
        self._clock, self._paused = clock, paused
        self._end = None if seconds_left is None else clock() + seconds_left
        self._first: TimedStep | None = None
        self._recent: deque[TimedStep] = deque(maxlen=rate_events or 1)
        self._live: Live | None = None
        if self._console.is_interactive:
            left = TextColumn("{task.fields[left]}", markup=False)
            self._bar = Progress(TextColumn("step"), BarColumn(bar_width=24), MofNCompleteColumn(), left)
            self._task = self._bar.add_task("", total=total_steps, completed=max(resumed_step, 0), left="")
            # No refresh thread: each event redraws the bar.
            self._live = Live(self._bar, console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
            self._console.show_cursor(True)  # rich hides it; a killed process would leave it hidden

    def log(self, metrics: Metrics) -> None:
        if "loss" in metrics:
            self._log_training(metrics)
        if evaluation := describe_evaluation(metrics):
            self._print(f"step {metrics['step']}: {evaluation}")

    def close(self, outcome: Outcome) -> None:
        if self._live is not None:
            self._live.stop()

    def _log_training(self, metrics: Metrics) -> None:
        step = metrics["step"]
        assert isinstance(step, int)
        self._recent.append(TimedStep(self._clock(), step, self._paused()))
        self._first = self._first or self._recent[0]
        values = describe_training(metrics)
        if self._end is not None:
            seconds: float | None = max(0.0, self._end - self._recent[-1].seconds)
        else:
            seconds = estimate_left([self._first, *self._recent], self._total)
        left = "" if seconds is None else f"{describe_duration(seconds)} left"
        of = "" if self._total is None else f"/{self._total}"
        line = " · ".join(filter(None, [f"step {step}{of}", values, left]))
        if self._live is not None:
            self._bar.update(self._task, completed=step, left=left)
            # Below the bar, whose width does not change with them. `soft_wrap` of the console would cut them off.
            lines = Text(values).wrap(self._console, self._console.width)
            self._live.update(Group(self._bar, *lines), refresh=True)
            _log.info("%s", line)
        else:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False)
        _log.info("%s", line)


def describe_training(metrics: Metrics) -> str:
    """Describe an event, 'loss 6.1234 · lr 5.00e-04 · 12,345 tokens/s' for the keys that it has; with the slowest rank
    if it is slow."""
    shown = (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("tokens_per_second", "{:,.0f} tokens/s"))
    values = [form.format(metrics[key]) for key, form in shown if metrics.get(key) is not None]
    ratio = metrics.get("slowest_rank_ratio")
    if isinstance(ratio, float) and ratio >= SLOW_RATIO:
        values.append(f"rank {metrics['slowest_rank']} takes {ratio:.1f} × the median time")
    return " · ".join(values)


def describe_evaluation(metrics: Metrics) -> str:
    """Describe the keys `eval/<corpus>/<metric>`: 'wiki loss 3.21, perplexity 24.8, accuracy 0.412 · news …'."""
    values = [
        (*key.removeprefix("eval/").rsplit("/", 1), value) for key, value in metrics.items() if key.startswith("eval/")
    ]
    return " · ".join(
        f"{corpus} " + ", ".join(f"{metric} {_figure(str(metric), value)}" for _, metric, value in group)
        for corpus, group in groupby(values, key=lambda value: value[0])
    )


def _figure(metric: str, value: int | float | str | None) -> str:
    if metric == "perplexity" and isinstance(value, float):
        return format_perplexity(value)
    if value is None:
        return UNKNOWN
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
