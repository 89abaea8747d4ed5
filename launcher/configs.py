"""Configs by the command that carries them out."""

from experiment.config import Section
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
