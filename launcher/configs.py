"""Configs by the command that carries them out."""

from pathlib import Path

import yaml

from experiment.config import Section
from experiment.config.yaml_dialect import read_yaml
from finetune.config import FinetuneConfig
from launcher.run_sets.compare_config import CompareConfig
from pretrain.cleaning.config import CleanConfig
from pretrain.config import PretrainConfig

CONFIGS: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "compare": CompareConfig,
    "clean": CleanConfig,
}


def config_of_command(command: str) -> type[Section] | None:
    """Return the config that a command takes; None if it takes none, or several kinds."""
    return CONFIGS.get({"plan": "pretrain", "preflight": "pretrain"}.get(command, command))


def command_of(config: str) -> str:
    """Return the command whose config has the most sections of a file; `pretrain` for one that cannot be read."""
    try:
        tree = read_yaml(Path(config).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None  # `load_config` raises it with a message
    sections = tree if isinstance(tree, dict) else {}
    return max(CONFIGS, key=lambda command: len(sections.keys() & CONFIGS[command].model_fields.keys()))
