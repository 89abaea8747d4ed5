"""Validation of runs that are not started, and their configs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment.config import FlatConfig, flatten, load_config
from experiment.errors import UserError, notify, user_errors_in, warn_once
from experiment.files import checksum
from experiment.models.model_names import local_model
from experiment.process.fast_imports import fast_imports, import_transformers_without_scipy
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder, check_not_moved
from finetune.config import FinetuneConfig
from finetune.data.task_config import TaskConfig, data_checksums
from launcher.hosts.machine import launch_machine
from launcher.launch import warnings_left_to_rank0
from launcher.launch_plan import plan_launch
from launcher.options import PretrainOptions
from pretrain.config import PretrainConfig
from pretrain.run_identity import PRECISION


def check_pretraining(config: str, overrides: dict[str, str]) -> None:
    """Check a config for `deepcloze validate`, and print warnings, also of a GPU here that cannot be used. Raises
    UserError for anything else that would keep the run from starting on this machine."""
    loaded = load_config(PretrainConfig, config, overrides)
    check_not_moved(config, overrides, RunFolder(Path(loaded.run.dir).absolute()))
    with fast_imports():
        import_transformers_without_scipy()
    machine = launch_machine()
    usable = replace(machine, devices=replace(machine.devices, problem=None))
    plan = plan_launch(PretrainOptions(config=config, overrides=overrides), loaded, usable)
    if plan.local and machine.devices.problem is not None:
        notify(f"warning: {machine.devices.problem}")
    for warning in loaded.warnings(loaded.schedule.known_steps):
        notify(f"warning: {warning}")


def validate_pretraining(
    config: str, overrides: dict[str, str], placement: Mapping[str, Any], is_recorded: bool
) -> FlatConfig:
    """Return the config of a pretraining run, the fingerprints of its corpora, the checksums of the model that it
    starts from, and the settings of precision in its DeepSpeed JSON, and print warnings. placement: of `LaunchOptions`.
    is_recorded: the record of the set, which is compared with the config, has the run.

    Raises UserError for anything that would keep the run from starting. A recorded one that is done is not started
    again: it may lack its checkpoints, the model that it started from may have been moved, and the checkpoint that it
    forked deleted.
    """
    loaded, machine = load_config(PretrainConfig, config, overrides), launch_machine()
    options = PretrainOptions(config=config, overrides=overrides, **placement)
    with warnings_left_to_rank0():
        try:
            plan = plan_launch(options, loaded, machine)
        except UserError:
            reported = read_outcome(RunFolder(Path(loaded.run.dir)))
            if not is_recorded or reported is None or reported.outcome is not Outcome.DONE:
                raise
            new = loaded.run.model_copy(update={"dir": f"{loaded.run.dir}/new", "resume": "auto"})
            plan = plan_launch(options, loaded.model_copy(update={"run": new}), machine)
    for warning in loaded.warnings(loaded.schedule.known_steps):
        warn_once(f"{config}: {warning}")  # points of a sweep have the same
    content = {key: value for key, value in plan.identity.items() if key.startswith(PRECISION)}
    content |= {"corpus.fingerprint": plan.identity["corpus.train"], "corpus.eval_fingerprints": plan.held_out}
    if loaded.model.init_from is not None and loaded.run.parent is None:
        content |= encoder_origin(loaded.model.init_from, "pretrained")
    # Not the resolved config, whose model.init_from may be a newer checkpoint after a restart.
    return flatten(loaded) | content


def validate_finetuning(config: str, overrides: Mapping[str, str], models: set[str] | None) -> FinetuneConfig:
    """Return the config of a fine-tuning run, with the precision that `auto` stands for on this machine. models: see
    `check_model`. Raises UserError, as above, except for the content of the data."""
    with fast_imports():
        from finetune.resolve import check_model, load_run_config

    loaded = load_run_config(config, overrides)
    with user_errors_in(config):
        precision = check_model(loaded, models).precision
    return loaded.model_copy(update={"training": loaded.training.model_copy(update={"precision": precision})})


def data_origin(task: TaskConfig) -> FlatConfig:
    """Return the checksums of the data of a fine-tuning run, `data.SPLIT`. Raises UserError for missing files."""
    return {f"data.{split}": found for split, found in data_checksums(task).items()}


def encoder_origin(init_from: str, weights: str) -> FlatConfig:
    """Return the checksums of the files that a run starts from, `encoder.FILE`. weights: see
    `finetune.config.ModelConfig`."""
    from finetune.model import model_files  # imports torch

    files = model_files(local_model(init_from), weights=weights == "pretrained")
    return {f"encoder.{path.name}": checksum(path) for path in files}
