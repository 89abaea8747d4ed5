"""The check that a transformers model uses the fields of its config that a user sets in `model.config`.

A transformers config keeps any keyword as an attribute, so a misspelt field changes nothing and raises nothing. A field
is used if one of these holds:

- The config class declares it: a default, an alias (`attribute_map`) or a property with a setter.
- The config class computes something from it, such as ModernBERT's `global_attn_every_n_layers`.
- A model looks it up in the config while it is built, such as DeBERTa's `position_buckets`.
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForMaskedLM,
    PreTrainedConfig,
)

from experiment.config import did_you_mean
from experiment.errors import UserError, first_line
from experiment.formatting import shorten
from experiment.models.model_folder import build_from_config
from experiment.models.transformers_models import quiet_transformers

# Fields of older releases, from which only a new config computes others -> the field to set.
_REPLACED = {"global_attn_every_n_layers": "layer_types"} | dict.fromkeys(
    ("rope_theta", "global_rope_theta", "local_rope_theta"), "rope_parameters"
)
# Tasks that a pretrained model may be fine-tuned for, with fields of their own.
_FINE_TUNING_HEADS = (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)


def check_fields(fields: Mapping[str, Any], make_config: Callable[[Mapping[str, Any]], PreTrainedConfig]) -> None:
    """Raise UserError for the first of the `fields` that is not used. `make_config`: fields -> config with them set.

    Whether a model looks a field up can depend on other fields (DeBERTa's `position_buckets` on `relative_attention`),
    so models are built with all fields that are known to be used, until no more turn out to be.
    """
    config = make_config({})
    known = declared_fields(config)
    used = {field for field in fields if field in known or _is_computed_with(field, make_config)}
    while unused := [field for field in fields if field not in used]:
        with_used = make_config({field: fields[field] for field in fields if field in used})
        for field in unused:  # a folder's config may have it
            vars(with_used).pop(field, None)
        looked_up = _missing_lookups(with_used)
        if looked_up.isdisjoint(unused):
            raise UserError(
                f"unknown config key 'model.config.{unused[0]}': '{config.model_type}' does not use it with this config"
                f"{_suggestion(unused[0], known, looked_up)}"
            )
        used |= looked_up.intersection(unused)


def declared_fields(config: PreTrainedConfig) -> set[str]:
    """Return fields with a default, aliases of them, and properties that can be set. Other keys in a folder's
    config.json are none of them."""
    members = inspect.getmembers_static(type(config))
    properties = {name for name, member in members if isinstance(member, property) and member.fset}
    public = {name for name in properties if not name.startswith("_")}
    return {*type(config)().to_dict(), *config.attribute_map, *public}


def with_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy with these fields set. Raises UserError for values that make no config."""
    config = copy.deepcopy(config)
    try:
        for field, value in fields.items():
            setattr(config, field, value)
        if "num_hidden_layers" in fields and "layer_types" not in fields and hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        config.validate()
    except Exception as error:  # transformers raises many types
        raise UserError(f"model.config: {first_line(error)}") from None
    return config


def _suggestion(field: str, declared: set[str], looked_up: set[str]) -> str:
    """Return the end of the message about an unused field."""
    if (replacement := _REPLACED.get(field)) in declared:
        return f"; set {replacement}"
    names = {name for name in declared | looked_up if not name.startswith("_")}
    common = declared_fields(PreTrainedConfig())  # few of them concern the model
    close = difflib.get_close_matches(field, common & names, n=1, cutoff=0.85)
    return shorten(did_you_mean(field, {*names - common, *close}), 350)


def _is_computed_with(field: str, make_config: Callable[[Mapping[str, Any]], PreTrainedConfig]) -> bool:
    """Return whether the value of an undeclared field influences anything but the attribute of that name.

    The value tried supports no operation, so that computing with it raises, and equals no other, so that passing it on
    is seen.
    """
    try:
        with quiet_transformers():
            config = make_config({field: object()})
    except Exception:  # transformers raises many types for values that it cannot use
        return True
    return _other_fields(config, field) != _other_fields(make_config({}), field)


def _other_fields(config: PreTrainedConfig, field: str) -> dict[str, Any]:
    """Return the other fields that are set. Private attributes are transformers' own, such as the attention
    implementation."""
    return {name: value for name, value in vars(config).items() if name != field and not name.startswith("_")}


def _missing_lookups(config: PreTrainedConfig) -> set[str]:
    """Return attributes that models look up in their config while they are built, and that it does not have.

    Raises UserError for a config that makes no masked-LM model.
    """
    missing: set[str] = set()

    def record(_: PreTrainedConfig, name: str) -> None:
        missing.add(name)
        raise AttributeError(name)

    # Python calls __getattr__ for missing attributes only. Models check the exact type of their config, which rules a
    # subclass out.
    with quiet_transformers(), torch.device("meta"), patch.object(type(config), "__getattr__", record, create=True):
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            build_from_config(AutoModelForMaskedLM, config, "model.config")
        for models in _FINE_TUNING_HEADS:
            with suppress(Exception):  # not every type has every head
                models[type(config)](copy.deepcopy(config))
    return missing
