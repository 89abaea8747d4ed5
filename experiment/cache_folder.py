"""The folder of what deepcloze may delete and make again, of this user on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`deepcloze` in XDG_CACHE_HOME, by default `~/.cache`. It may not exist, nor be writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (never raises)
    return Path(home) / "deepcloze"
