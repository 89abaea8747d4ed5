"""The run on the terminal: a progress line where somebody watches, plain lines where the output is kept."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from experiment.run_folder import Outcome

RATE_EVENTS = 20  # the time left is reckoned from the pace of the last so many log events


@cache
def terminal() -> Console:
    """The terminal, shared by the progress line and the log messages so that neither breaks the other."""
    return Console(stderr=True, highlight=False, soft_wrap=True, force_interactive=sys.stderr.isatty())


class ConsoleTracker:
    """Shows training events as a progress line (without a terminal: one line each), evaluations as lines of their own.

    total_steps: None where the end is not known in steps. clock: seconds, for the time left.
    """

    def __init__(
        self,
        total_steps: int | None,
        resumed_step: int = -1,
        unit: str = "step",
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total = total_steps
        self._unit = unit
        self._console = console or terminal()
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_EVENTS)
        self._progress: Progress | None = None
        if self._console.is_interactive:
            self._progress = Progress(
                TextColumn(unit),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
                auto_refresh=False,  # no thread beside the training loop: each event draws the line anew
            )
            self._task = self._progress.add_task("", total=total_steps, completed=max(resumed_step, 0), figures="")
            self._progress.start()
            self._console.show_cursor(True)  # a killed process must not leave the terminal without its cursor

    def log(self, metrics: Mapping[str, Any]) -> None:
        if "loss" in metrics:
            self._training(metrics)
        if evaluation := describe_evaluation(metrics):
            self._print(f"{self._unit} {metrics['step']}: {evaluation}")

    def close(self, outcome: Outcome) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _training(self, metrics: Mapping[str, Any]) -> None:
        step = metrics["step"]
        self._marks.append((self._clock(), step))
        figures = describe_training(metrics)
        if self._total is not None:
            figures += f" · {describe_duration(self._seconds_left())} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures, refresh=True)
        else:
            of = "" if self._total is None else f"/{self._total}"
            self._print(f"{self._unit} {step}{of} · {figures}")

    def _seconds_left(self) -> float | None:
        (began, first), (now, step) = self._marks[0], self._marks[-1]
        if step <= first or self._total is None:
            return None
        return (self._total - step) * (now - began) / (step - first)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False)


def describe_training(metrics: Mapping[str, Any]) -> str:
    """'loss 6.1234 · lr 5.00e-04 · 12,345 tokens/s' of the figures that the event has."""
    shown = (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("tokens_per_second", "{:,.0f} tokens/s"))
    return " · ".join(form.format(metrics[key]) for key, form in shown if metrics.get(key) is not None)


def describe_evaluation(metrics: Mapping[str, Any]) -> str:
    """'wiki loss 3.21, perplexity 24.8, accuracy 0.412 · news …' of the `eval/<corpus>/<metric>` figures."""
    figures = [
        (*key.removeprefix("eval/").rsplit("/", 1), value) for key, value in metrics.items() if key.startswith("eval/")
    ]
    return " · ".join(
        f"{corpus} " + ", ".join(f"{metric} {_number(value)}" for _, metric, value in group)
        for corpus, group in groupby(figures, key=lambda figure: figure[0])
    )


def describe_duration(seconds: float | None) -> str:
    """'1h05m', '2m10s' or '9s'; '–' for None."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _number(value: int | float | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
