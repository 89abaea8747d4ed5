"""The check that a transformers model uses the fields of its config that a user sets in `model.config`.

A transformers config keeps any keyword as an attribute, so a misspelt field changes nothing and raises nothing. A field
is used if one of these holds:

- The config class declares it: a default, an alias (`attribute_map`) or a property with a setter.
- The config class computes something from it, such as ModernBERT's `global_attn_every_n_layers`.
- The source of its models reads it from their config, such as DeBERTa's `position_buckets`. Their base class reads
  `gradient_checkpointing` and `tie_word_embeddings`.
"""

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from experiment.config import did_you_mean
from experiment.errors import UserError, first_line
from experiment.formatting import shorten
from experiment.models.transformers_models import quiet_transformers

# Fields of older releases, from which only a new config computes others -> the field to set.
_REPLACED = {"global_attn_every_n_layers": "layer_types"} | dict.fromkeys(
    ("rope_theta", "global_rope_theta", "local_rope_theta"), "rope_parameters"
)
_READ_BY_ALL = ("gradient_checkpointing", "tie_word_embeddings")  # by the base class of all models
_UNREAD_OUTPUTS = ("output_attentions", "output_hidden_states")
_READ_FIELD = re.compile(r"""\b(?:config\.|getattr\((?:self\.)?config, ")(\w+)""")


def check_fields(fields: Mapping[str, Any], make_config: Callable[[Mapping[str, Any]], PreTrainedConfig]) -> None:
    """Raise UserError for the first of the `fields` that is not used. `make_config`: fields -> config with them set."""
    if found := [field for field in _UNREAD_OUTPUTS if fields.get(field)]:
        raise UserError(f"model.config.{found[0]}: nothing reads these outputs; leave it out")
    config = make_config({})
    known = declared_fields(config) | _fields_in_source(config)
    for field in fields:
        if field not in known and field not in _READ_BY_ALL and not _is_computed_with(field, make_config):
            raise UserError(
                f"unknown config key 'model.config.{field}': '{config.model_type}' does not use it"
                f"{_suggestion(field, known)}"
            )


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


def _fields_in_source(config: PreTrainedConfig) -> set[str]:
    """Return attributes that models read from their config and that are neither methods nor fields of its text part."""
    file = Path(inspect.getfile(type(config)))
    sources = file.parent.glob(file.name.replace("configuration_", "modeling_"))
    read = {name for path in sources for name in _READ_FIELD.findall(path.read_text(encoding="utf-8"))}
    return read - {*dir(type(config))} - declared_fields(config.get_text_config())


def _suggestion(field: str, known: set[str]) -> str:
    """Return the end of the message about an unused field."""
    if (replacement := _REPLACED.get(field)) in known:
        return f"; set {replacement}"
    names = {name for name in known if not name.startswith("_")}
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
