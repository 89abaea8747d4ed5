"""Constrained numbers of the configs of pretraining and fine-tuning, besides pydantic's own."""

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SequenceLength = Annotated[int, Field(ge=8)]  # tokens, special tokens included
