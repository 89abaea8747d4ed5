"""Read JSON that users write: what Python's reader lets pass, or fails at in ways of its own, is one kind of error."""

import json
from typing import Any

_MAX_DIGITS = 4300  # Python refuses to read longer whole numbers


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError with one line, also for a key that an object has twice, of which
    Python keeps the last, for a whole number of more than 4300 digits, and for nesting that is too deep."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in an object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:12]}… has {len(digits):,} digits, more than {_MAX_DIGITS:,}")
    return int(digits)
