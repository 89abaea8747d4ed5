"""A transformers masked-LM model that is built from its config alone."""

import copy

import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from experiment.errors import UserError

_MAX_LAYERS = 1000  # more are a mistake, and would be built one by one until the memory is full


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights from torch's generator. Raises UserError for a config that makes no model."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise UserError(f"model.config: 'num_hidden_layers' is {layers:,}; expected at most {_MAX_LAYERS:,}")
    try:
        # transformers stores dtype and attention implementation in the config it is given.
        return AutoModelForMaskedLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for values that make no model
        raise UserError(
            f"model.config: cannot build a '{config.model_type}' model from it: {first_line(error)}"
        ) from None


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: modules, names and shapes without memory for weights. Raises as `random_model`."""
    with torch.device("meta"):
        return random_model(config)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the second if the first announces it; its type if it has none."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
