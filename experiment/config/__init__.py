"""YAML file + `--section.key=value` overrides -> a strict, typed config."""

from experiment.config.loading import Section, build_config, dump_config, flatten, load_config, nearest

__all__ = ["Section", "build_config", "dump_config", "flatten", "load_config", "nearest"]
