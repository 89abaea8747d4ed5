"""Messages of the launcher to the user."""

import sys
from contextlib import suppress


def notify(message: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)


def end_line() -> None:
    """On a terminal, begin a new line: the last one may have a progress bar, or ^C."""
    with suppress(OSError):
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)
