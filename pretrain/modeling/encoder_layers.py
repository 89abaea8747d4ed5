"""The repeated layers of an encoder."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Forward = Callable[..., Any]


def encoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """In order; empty for the few types of models whose layers are not a `GradientCheckpointingLayer`."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def forward_without_checkpointing(layer: GradientCheckpointingLayer) -> Forward:
    """The layer's own `forward`, which transformers wraps for activation checkpointing."""
    forward: Forward = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
    return MethodType(forward, layer)
