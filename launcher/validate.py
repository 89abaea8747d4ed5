"""`deepcloze validate`: check a config without starting anything."""

from experiment.config import load_config
from experiment.errors import notify
from experiment.fast_imports import fast_imports
from launcher.hosts.machine import inspect_machine, select_accelerator
from launcher.launch_plan import plan_launch
from launcher.options import PretrainOptions, ValidateOptions
from launcher.sweeps.sweep_plan import is_finetuning
from pretrain.config import PretrainConfig


def validate_command(options: ValidateOptions) -> None:
    """Raises UserError for anything that would keep the run from starting on this machine."""
    if is_finetuning(options.config):
        with fast_imports():
            from finetune.run import check

        check(options.config, options.overrides)
        print(f"{options.config}: valid, for deepcloze finetune")
    else:
        _validate_pretraining(PretrainOptions(config=options.config, overrides=options.overrides))
        print(f"{options.config}: valid, for deepcloze pretrain")


def _validate_pretraining(options: PretrainOptions) -> None:
    config, machine = load_config(PretrainConfig, options.config, options.overrides), inspect_machine()
    select_accelerator(machine.devices)
    plan_launch(options, config, machine)
    steps = config.schedule.known_steps
    for warning in () if steps is None else config.schedule.warnings(steps):
        notify(f"warning: {warning}")
