"""`deepcloze clean`: give a cleaning the texts of the fine-tuning tasks that it decontaminates against."""

from collections.abc import Mapping, Sequence

from experiment.config import load_config
from experiment.config.recipes import find_config
from experiment.decontamination import EvaluationText
from experiment.errors import user_errors_in
from experiment.process.fast_imports import fast_imports
from launcher.options import CleanOptions
from pretrain.cleaning.config import CleanConfig


def clean_command(options: CleanOptions) -> None:
    """Clean documents. Raises UserError for bad input, and StoppedError if the cleaning can be resumed."""
    config = load_config(CleanConfig, options.config, options.overrides)
    from pretrain.cleaning.run import clean

    clean(config, read_task, options.workers, options.engine, options.ray_address)


def check_cleaning(config: str, overrides: Mapping[str, str]) -> None:
    """Check a config and the files that it names, of its source the first document. Raises UserError."""
    from pretrain.cleaning.run import check

    check(load_config(CleanConfig, config, overrides), read_task)


def read_task(name: str) -> Sequence[EvaluationText]:
    """Return the texts of the validation and test splits of a fine-tuning config, named by its path or as a recipe."""
    with fast_imports():
        from finetune.evaluation_texts import evaluation_texts

    with user_errors_in(f"decontaminate.against: {name}"):
        return evaluation_texts(find_config(name, "finetune"))
