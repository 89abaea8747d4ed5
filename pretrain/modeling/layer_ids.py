"""Where in a transformers model a parameter stands, told by its name."""

import re

from torch import nn
from transformers import PreTrainedModel

from experiment.config import nearest
from experiment.errors import UserError

_NUMBERED = re.compile(r"\.(\d+)\.")


def layer_ids(model: PreTrainedModel) -> dict[str, int]:
    """Name of each parameter -> 0 for embeddings, 1 … L for the encoder's layers from the bottom, L + 1 for the head.

    The numbering of ELECTRA (Clark et al. 2020) and BEiT. A layer is the outermost numbered module of the encoder, so
    layers that share their weights count once. What all layers share (relative positions) counts as an embedding, what
    follows the last layer (a final norm) as head.
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


def matches(item: str, name: str) -> bool:
    """Whether `item` is one or several consecutive dotted parts of a parameter's name."""
    return f".{item}." in f".{name}."


def check_freeze(freeze: tuple[str, ...], model: nn.Module) -> None:
    """Raises UserError for an item that names nothing, and where nothing would be left to train."""
    names = [name for name, _ in model.named_parameters()]
    for item in freeze:
        if not any(matches(item, name) for name in names):
            raise UserError(
                f"model.freeze: no parameter of the model is in a module '{item}'{nearest(item, _parts(names))}"
            )
    if freeze and all(any(matches(item, name) for item in freeze) for name in names):
        raise UserError(f"model.freeze: {', '.join(freeze)} is the whole model; nothing would be trained")


def _parts(names: list[str]) -> set[str]:
    """The modules of these parameters as one would name them: embeddings, layer.0, attention, …"""
    return set(re.findall(r"(?<=\.)[a-zA-Z_]\w*(?:\.\d+)?(?=\.)", "\n".join(f".{name}" for name in names)))
