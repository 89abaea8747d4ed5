"""Progress of long work on stderr: a bar on a terminal, otherwise a plain line every ten seconds."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiment.errors import QUIET_VARIABLE, is_quiet
from experiment.process.own_process import variable_set

T = TypeVar("T")

_SECONDS_BEFORE_BAR = 1.0  # short work shows none
_SECONDS_BETWEEN_LINES = 10.0
_WITHOUT_WARNINGS = "warnings too"  # value of the variable for quiet processes


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Drop further output if the process that reads it has exited, as in `2>&1 | head`. The default raises
        SystemExit, but a run can continue: it has log files."""
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)


@cache
def terminal() -> Console:
    """Return the console on stderr, which prints text as it is; the progress bar and the log messages share it so as
    not to overwrite each other. With `--quiet`, it prints nothing."""
    return _console(force_interactive=sys.stderr.isatty() and not is_quiet(), quiet=is_quiet())


def _console(**options: Any) -> Console:
    return _Stderr(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, **options)


@contextmanager
def without_bars(library: Any) -> Iterator[None]:
    """Hide the progress bars of a library in the block, except on a terminal or in a notebook: in a file they are many
    lines. library: `huggingface_hub.utils` or `datasets.utils`."""
    is_shown = terminal().is_interactive or (terminal().is_jupyter and not is_quiet())
    if is_shown or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


def warning_console() -> Console:
    """Return a console like `terminal` that also prints with `--quiet`."""
    return _console() if is_quiet() else terminal()


def print_warning(line: str) -> None:
    """Print a line on the terminal, also with `--quiet`."""
    if os.environ.get(QUIET_VARIABLE) != _WITHOUT_WARNINGS:
        warning_console().print(line)


@contextmanager
def quiet(warnings: bool = True) -> Iterator[None]:
    """Print only results, warnings and errors in the block and the processes that it starts. warnings: whether to print
    warnings about the data, too."""
    try:
        with variable_set(QUIET_VARIABLE, "1" if warnings else _WITHOUT_WARNINGS):
            terminal.cache_clear()
            yield
    finally:
        terminal.cache_clear()


@contextmanager
def progress(
    label: str,
    total: float | None,
    unit: str = "",
    shown: bool = True,
    clock: Callable[[], float] = time.monotonic,
    describe: Callable[[float], str] | None = None,
) -> Iterator[Callable[[float], None]]:
    """Show progress while the block runs. Yields a function to call with the amount that has been done since.

    Args:
        label: of the work, such as 'verifying wiki'.
        total: None if it is not known.
        unit: of the total and the amounts, in the plural.
        clock: returns seconds.
        describe: amount done so far -> text beside the bar; default: '3 of 10 files'.
    """
    console, bar = terminal(), _bar()
    task = bar.add_task(label, total=total, count="")
    describe = describe or (lambda done: f"{done:,.0f} of {total:,.0f} {unit}")
    shown_at, done, started = clock(), 0.0, False

    def advance(amount: float) -> None:
        nonlocal shown_at, done, started
        done += amount
        count = describe(done)
        bar.update(task, completed=done, count=count)
        waited = clock() - shown_at
        if console.is_interactive and shown and not started and waited > _SECONDS_BEFORE_BAR:
            with suppress(LiveError):  # another bar is shown
                bar.start()
                console.show_cursor(True)  # rich hides it; a killed process would leave it hidden
                started = True
        elif not console.is_interactive and shown and waited > _SECONDS_BETWEEN_LINES:
            console.print(f"{label}: {count}")
            shown_at = clock()

    try:
        yield advance
    finally:
        if started:
            bar.stop()


def track(items: Iterable[T], label: str, total: int, unit: str, shown: bool = True) -> Iterator[T]:
    """Iterate over items, and show the progress. Arguments as of `progress`."""
    with progress(label, total, unit, shown) as advance:
        for item in items:
            yield item
            advance(1)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=terminal(), transient=True)
