"""Configs by the command that reads them."""

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
