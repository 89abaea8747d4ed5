"""YAML file + `--section.key=value` overrides -> a strict, typed config."""

from experiment.config.field_types import Metavar, Positional
from experiment.config.loading import (
    FlatConfig,
    Section,
    build_config,
    dump_config,
    flatten,
    load_config,
    read_config_file,
    read_recorded,
    with_defaults,
)
from experiment.config.validation_errors import did_you_mean

__all__ = [
    "FlatConfig",
    "Metavar",
    "Positional",
    "Section",
    "build_config",
    "did_you_mean",
    "dump_config",
    "flatten",
    "load_config",
    "read_config_file",
    "read_recorded",
    "with_defaults",
]
