"""Names for the parts of a training step and for collectives, which appear in profiles."""

from typing import Literal

from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "reduce gradients", "update weights", "wait for ranks"]

PREFIX = "deepcloze: "
COLLECTIVE_PREFIX = "deepcloze collective: "


def phase(name: Phase) -> record_function:
    """A context whose time a profile counts as this part of the step. Costs a microsecond where nothing is profiled."""
    return record_function(PREFIX + name)


def collective(name: str) -> record_function:
    """A context or decorator whose time a profile counts as communication, as that of torch's own collectives."""
    return record_function(COLLECTIVE_PREFIX + name)
