"""Whether a model can be packed, found out with a small model of the same kind: its own weights may not fit here."""

import logging
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from experiment.errors import UserError
from experiment.positions import first_position
from experiment.transformers_logging import quiet_transformers
from pretrain.modeling.packability import why_not_packed
from pretrain.modeling.random_model import random_model

log = logging.getLogger(__name__)

# Sizes on which packability does not depend, under the names that configs have for them.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "dim", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 2),
}
_PER_LAYER = ("layer_types", "head_dim", "attention_head_size")  # follow from the sizes above


def is_packed(config: PreTrainedConfig) -> bool:
    with quiet_transformers():
        try:
            model = random_model(_small(config))
        except (UserError, TypeError, ValueError):
            model = random_model(config)
        return why_not_packed(model.float(), first_position(model)) is None


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    fields = {name: value for name, value in config.to_dict().items() if name not in _PER_LAYER}
    fields |= {name: size for name, size in _SMALL.items() if name in fields}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
