"""Messages of the launcher to the user."""

import sys
from contextlib import suppress


def notify(message: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)
