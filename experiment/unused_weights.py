"""Weights in a model folder that its config leaves no place for."""

import re
from collections.abc import Iterable
from pathlib import Path

_NUMBERED = re.compile(r"\.\d+\.")


def describe_unused_layers(folder: Path, unused: Iterable[str]) -> str | None:
    """One line on the numbered layers among the tensors that a model does not use; None if there are none."""
    names = sorted(name for name in unused if _NUMBERED.search(name))
    if not names:
        return None
    return f"the config has fewer layers than {folder}: {len(names)} tensors are left out ({names[0]} …)"
