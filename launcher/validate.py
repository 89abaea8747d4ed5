"""`deepcloze validate`: check a config without starting anything."""

from experiment.config import load_config
from experiment.errors import notify
from experiment.fast_imports import fast_imports
from finetune.config import FinetuneConfig
from launcher.launch_plan import plan_launch
from launcher.options import CompareOptions, PretrainOptions, ValidateOptions
from launcher.run_validation import command_of, launch_machine
from pretrain.config import PretrainConfig


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
