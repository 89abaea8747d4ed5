"""`model.freeze`: parts of parameter names that select the parameters not to train."""

import re
from typing import TYPE_CHECKING

from experiment.config import did_you_mean
from experiment.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def is_in_module(parameter: str, module: str) -> bool:
    """Whether `module` is one part, or several consecutive dotted parts, of the parameter's name."""
    return f".{module}." in f".{parameter}."


def check_freeze(freeze: tuple[str, ...], model: "nn.Module") -> None:
    """Raise UserError for a module without parameters, and if nothing would be left to train."""
    names = [name for name, _ in model.named_parameters()]
    for module in freeze:
        if not any(is_in_module(name, module) for name in names):
            raise UserError(
                f"model.freeze: no parameter of the model is in a module '{module}'"
                f"{did_you_mean(module, _modules(names))}"
            )
    if freeze and all(any(is_in_module(name, module) for module in freeze) for name in names):
        raise UserError(f"model.freeze: {', '.join(freeze)} is the whole model; nothing would be trained")


def _modules(names: list[str]) -> set[str]:
    """Short names of these parameters' modules: embeddings, layer.0, attention, …"""
    return set(re.findall(r"(?<=\.)[a-zA-Z_]\w*(?:\.\d+)?(?=\.)", "\n".join(f".{name}" for name in names)))
