"""Values of command-line flags, which arrive as raw text, as None or True, or typed from Python."""

from typing import Any

from experiment.config import nearest
from experiment.errors import UserError


def positive(name: str, value: Any) -> int:
    """A whole number above 0. Raises UserError."""
    number = whole(name, value)
    if number < 1:
        raise UserError(f"--{name}: expected a whole number above 0, found {value}")
    return number


def whole(name: str, value: Any) -> int:
    """A whole number, 0 included. Raises UserError."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit():
        raise UserError(f"--{name}: expected a whole number, found {value}")
    return int(text)


def flag(name: str, value: Any) -> bool:
    """A switch: `--name`, `--name=true`, `--name=false`. Raises UserError."""
    switch = {"true": True, "false": False, "none": False}.get(str(value).strip().lower())
    if switch is None:
        raise UserError(f"--{name}: expected true or false, found {value}")
    return switch


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of `choices`. Raises UserError that names the nearest one."""
    if value not in choices:
        raise UserError(
            f"--{name}: expected one of {', '.join(choices)}, found {value}{nearest(str(value), list(choices))}"
        )
    return str(value)
