"""`deepcloze validate`: check a config without starting anything."""

from experiment.fast_imports import fast_imports
from launcher.options import ValidateOptions
from launcher.sweeps.sweep_plan import is_finetuning, validate_pretraining


def validate_command(options: ValidateOptions) -> None:
    """Raises UserError for anything that would keep the run from starting on this machine."""
    if is_finetuning(options.config):
        with fast_imports():
            from finetune.run import finetune

        finetune(options.config, options.overrides, dry_run=True)
        print(f"{options.config}: valid, for deepcloze finetune")
    else:
        validate_pretraining(options.config, {})(options.overrides)
        print(f"{options.config}: valid, for deepcloze pretrain")
