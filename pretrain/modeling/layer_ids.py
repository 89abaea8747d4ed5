"""The layer of each parameter of a transformers model."""

import re

from torch import nn
from transformers import PreTrainedModel

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
