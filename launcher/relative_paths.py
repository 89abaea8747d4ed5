"""Relative paths in configs begin at the working directory: a hint for one that begins at its config's folder."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from experiment.config import read_recorded

_MISSING = re.compile("does not exist|no such", re.IGNORECASE)


def hint(message: str, argv: Sequence[str]) -> str:
    """To append to the message about a missing file or folder: the path that a config of the command line means, if it
    exists beside that config only; else empty."""
    configs = [Path(argument.rpartition("=")[2]) for argument in argv if _MISSING.search(message)]
    for config in configs:
        for text in _texts(read_recorded(config)) if config.suffix in (".yaml", ".yml") else ():
            with suppress(OSError, ValueError):  # no path
                named = re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-]|\.\w)", message)
                if named and not Path(text).exists() and (config.parent / text).exists():
                    return f"; relative paths begin at the working directory: did you mean {config.parent / text}?"
    return ""


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _texts(below)
