"""YAML file + `--section.key=value` overrides -> a strict, typed config."""

from experiment.config.fields import Metavar, Positional
from experiment.config.loading import Section, build_config, dump_config, flatten, load_config, nearest

__all__ = [
    "Metavar",
    "Positional",
    "Section",
    "build_config",
    "dump_config",
    "flatten",
    "load_config",
    "nearest",
]
