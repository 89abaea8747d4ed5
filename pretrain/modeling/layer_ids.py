"""The layer of each parameter of a transformers model, and selection of parameters by module name."""

import re

from torch import nn
from transformers import PreTrainedModel

from experiment.config import did_you_mean
from experiment.errors import UserError

_NUMBERED = re.compile(r"\.(\d+)\.")


def layer_ids(model: PreTrainedModel) -> dict[str, int]:
    """Parameter name -> 0 for embeddings, 1 … L for the encoder's layers from the bottom, L + 1 for the head.

    The numbering of ELECTRA (Clark et al. 2020) and BEiT. A layer is the outermost numbered module of the encoder, so
    layers that share their weights count once. Parameters shared by all layers (relative positions) count as
    embeddings, those after the last layer (a final norm) as head.
    """
    encoder = f"{model.base_model_prefix}."
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    ids: dict[str, int] = {}
    layers = 0
    for name, parameter in model.named_parameters():
        number = _NUMBERED.search(name) if name.startswith(encoder) else None
        if number is not None:
            ids[name] = int(number[1]) + 1
            layers = max(layers, ids[name])
        elif id(parameter) in tables or "embedding" in name:
            ids[name] = 0
        else:
            ids[name] = -1
    return {name: layers + 1 if number < 0 else number for name, number in ids.items()}


def is_in_module(parameter: str, module: str) -> bool:
    """Whether `module` is one part, or several consecutive dotted parts, of the parameter's name."""
    return f".{module}." in f".{parameter}."


def check_freeze(freeze: tuple[str, ...], model: nn.Module) -> None:
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
