"""Constrained numbers and texts of the configs of pretraining and fine-tuning, besides pydantic's own."""

import os
from typing import Annotated

from pydantic import AfterValidator, Field


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    if not path:
        raise ValueError("expected a path, found an empty text; '.' is the working directory")
    return os.path.expanduser(path)  # noqa: PTH111 (never raises; the shell does not expand `--run.dir=~/run`)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SequenceLength = Annotated[int, Field(ge=8)]  # tokens, special tokens included
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger ones
PathText = Annotated[str, AfterValidator(_check_path)]  # ~ becomes the home folder
