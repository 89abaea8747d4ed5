"""Constrained numbers and texts of the configs of pretraining and fine-tuning, besides pydantic's own."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, Strict


def expand_home(path: str) -> str:
    """`path` with ~ as the home folder, which shells do not expand in `--run.dir=~/run` or quotes. Never raises."""
    return os.path.expanduser(path)  # noqa: PTH111


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    if not path:
        raise ValueError("expected a path, found an empty text; '.' is the working directory")
    return expand_home(path)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SequenceLength = Annotated[int, Field(ge=8)]  # tokens, special tokens included
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger ones
PathText = Annotated[str, AfterValidator(_check_path)]  # ~ becomes the home folder
PathName = Annotated[Path, Strict(False), AfterValidator(lambda path: Path(expand_home(str(path))))]  # text will do
