"""Exceptions that end a command without being a bug, and messages to the user."""

import sys
from contextlib import suppress


class UserError(ValueError):
    """A mistake of the user: bad input, a bad config, a missing file.

    The message is complete: it names the file, line or key, the value found and what was expected. `deepcloze` prints
    it to stderr without a traceback and exits 2.
    """


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, without the number and the path that the text of an OSError has."""
    return getattr(error, "strerror", None) or str(error)


class AgreedFailureError(Exception):
    """The run cannot continue. All ranks raise it in the same step; the message is for the user."""


class StoppedError(Exception):
    """The run was stopped early and can be resumed (signal, STOP file, time limit). `deepcloze` exits 75."""


def notify(message: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)


def end_line() -> None:
    """On a terminal, begin a new line: the last one may have a progress bar, or ^C."""
    with suppress(OSError):
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)
