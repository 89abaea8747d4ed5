"""A masked-LM model that is built from its transformers config alone."""

import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from experiment.models.model_folder import build_from_config


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights from torch's generator. Raises UserError for a config that makes no model."""
    return build_from_config(AutoModelForMaskedLM, config, "model.config")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device: modules, names and shapes without memory for weights. Raises as
    `random_model`."""
    with torch.device("meta"):
        return random_model(config)
