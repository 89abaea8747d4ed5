"""`deepcloze validate`: check a config without starting anything; the same for the runs of sweeps and comparisons."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiment.config import flatten, load_config
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import notify
from experiment.fast_imports import fast_imports
from finetune.config import FinetuneConfig
from launcher.hosts.machine import launch_machine
from launcher.launch import warnings_left_to_rank0
from launcher.launch_plan import plan_launch
from launcher.options import CompareOptions, PretrainOptions, ValidateOptions
from launcher.run_set import FlatConfig
from pretrain.config import PretrainConfig

_COMMANDS = {"task": "finetune", "rows": "compare", "steps": "clean", "source": "clean", "output": "clean"}
"""Section of a config -> the command that the config is for."""

Validate = Callable[[dict[str, str]], FlatConfig]
"""Config overrides -> the config of the run. Raises UserError for anything that would keep the run from starting."""


def command_of(config: str) -> str:
    """The command that a config file is for; `pretrain` for one that cannot be read."""
    try:
        tree = read_yaml(Path(config).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None  # `load_config` raises it with a message
    sections = tree if isinstance(tree, dict) else {}
    return next((command for section, command in _COMMANDS.items() if section in sections), "pretrain")


def validate_command(options: ValidateOptions) -> None:
    """Raises UserError for anything that would keep the run from starting on this machine."""
    command = command_of(options.config)
    if command == "clean":
        from launcher.clean import check_cleaning

        check_cleaning(options.config, options.overrides)
    elif command == "compare":
        with fast_imports():
            from launcher.compare_plan import plan_comparison

        plan_comparison(CompareOptions(file=options.config, overrides=options.overrides))
    elif command == "finetune":
        load_config(FinetuneConfig, options.config, options.overrides)  # before the imports, which take seconds
        with fast_imports():
            from finetune.run import check

        check(options.config, options.overrides)
    else:
        config, machine = load_config(PretrainConfig, options.config, options.overrides), launch_machine()
        plan_launch(PretrainOptions(config=options.config, overrides=options.overrides), config, machine)
        for warning in config.warnings(config.schedule.known_steps):
            notify(f"warning: {warning}")
    print(f"{options.config}: valid, for deepcloze {command}")


def validate_pretraining(config: str, placement: Mapping[str, Any]) -> Validate:
    """Validation of pretraining runs of a config file. placement: of `LaunchOptions`."""
    machine = launch_machine()

    def validate(overrides: dict[str, str]) -> FlatConfig:
        point = load_config(PretrainConfig, config, overrides)
        with warnings_left_to_rank0():
            plan_launch(PretrainOptions(config=config, overrides=overrides, **placement), point, machine)
        return flatten(point)  # not the resolved one, whose model.init_from may be a newer checkpoint after a restart

    return validate


def validate_finetuning(config: str) -> Validate:
    """Validation of fine-tuning runs of a config file."""
    with fast_imports():
        from finetune.resolve import load_run_config

    return lambda overrides: flatten(load_run_config(config, overrides))
