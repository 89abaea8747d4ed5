"""The runs of a sweep: each point of a grid, validated as the run it will be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiment.config import did_you_mean, flatten, load_config
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from experiment.fast_imports import fast_imports
from experiment.own_process import module_command
from launcher.hosts.machine import inspect_machine, select_accelerator
from launcher.launch import warnings_left_to_rank0
from launcher.launch_plan import plan_launch
from launcher.options import LaunchOptions, PretrainOptions, SweepOptions
from launcher.sweeps.sweep_grid import grid_points, parse_grid
from pretrain.config import PretrainConfig

FlatConfig = Mapping[str, object]
"""Dotted config key -> value."""

Validate = Callable[[dict[str, str]], FlatConfig]
"""Config overrides -> the config of the run. Raises UserError for anything that would keep the run from starting."""


@dataclass(frozen=True)
class SweepRun:
    """One point of the grid."""

    name: str  # of its folder in OUTPUT
    values: Mapping[str, str]  # dotted config key -> raw text
    argv: tuple[str, ...]  # the command that starts or resumes it
    config: FlatConfig


@dataclass(frozen=True)
class SweepPlan:
    """The validated runs of a sweep."""

    runs: tuple[SweepRun, ...]
    output: Path  # absolute
    metric: str  # to compare the runs by
    lower_is_better: bool


def plan_sweep(options: SweepOptions) -> SweepPlan:
    """Validate all points of the grid. Writes and starts nothing.

    Raises UserError for anything that would keep one of the runs from starting.
    """
    config, finetuning = options.config, is_finetuning(options.config)
    placement = options.model_dump(include=set(LaunchOptions.model_fields), exclude_defaults=True)
    if finetuning and placement:
        raise UserError(f"--{next(iter(placement))} applies to pretraining only; {config} is a fine-tuning config")
    points = grid_points(parse_grid(options.grid))
    if duplicates := [key for key in next(iter(points.values())) if key in options.overrides]:
        raise UserError(f"'{duplicates[0]}' is given both in --grid and as an override")
    validate = validate_finetuning(config) if finetuning else validate_pretraining(config, placement)
    command = [*module_command("launcher"), "finetune" if finetuning else "pretrain", "--config", config]
    command += [f"--{name}={value}" for name, value in placement.items()]

    output, runs = options.output, []
    for name, values in points.items():
        overrides = options.overrides | values
        try:
            if output is None:
                output = f"{_run_dir(config, overrides, finetuning)}-sweep"
            overrides["run.dir"] = str(Path(output).absolute() / name)
            validated = validate(overrides)
        except UserError as error:
            raise UserError(f"sweep: {name}: {error}") from None
        argv = (*command, *(f"--{key}={text}" for key, text in overrides.items()))
        runs.append(SweepRun(name, values, argv, validated))
    assert output is not None
    metric, lower_is_better = _choose_metric(options.metric, runs[0].config, finetuning)
    return SweepPlan(tuple(runs), Path(output).absolute(), metric, lower_is_better)


def is_finetuning(config: str) -> bool:
    """Whether a config file is for fine-tuning, not for pretraining. False for one that cannot be read."""
    try:
        tree = read_yaml(Path(config).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load_config` raises it with a message
    return isinstance(tree, dict) and "task" in tree


def _run_dir(config: str, overrides: dict[str, str], finetuning: bool) -> str:
    """The run folder named by the config. It may be in use: no run of the sweep writes to it."""
    if finetuning:
        return str(validate_finetuning(config)(overrides)["run.dir"])
    return load_config(PretrainConfig, config, overrides).run.dir


def validate_pretraining(config: str, placement: Mapping[str, Any]) -> Validate:
    """Validation of pretraining runs of a config file. placement: of `LaunchOptions`."""
    machine = inspect_machine()
    select_accelerator(machine.devices)

    def validate(overrides: dict[str, str]) -> FlatConfig:
        point = load_config(PretrainConfig, config, overrides)
        with warnings_left_to_rank0():
            plan_launch(PretrainOptions(config=config, overrides=overrides, **placement), point, machine)
        return flatten(point)  # not the resolved one, whose model.init_from may be a newer checkpoint after a restart

    return validate


def validate_finetuning(config: str) -> Validate:
    """Validation of fine-tuning runs of a config file."""
    with fast_imports():
        from finetune.config import FinetuneConfig
        from finetune.run import resolve_paths

    def validate(overrides: dict[str, str]) -> FlatConfig:
        return flatten(resolve_paths(load_config(FinetuneConfig, config, overrides), default_name=Path(config).stem))

    return validate


def _choose_metric(requested: str | None, config: FlatConfig, finetuning: bool) -> tuple[str, bool]:
    """The metric to compare runs by, and whether lower is better. Raises UserError for one that runs do not report."""
    if finetuning:
        from finetune.task_kind import Direction, find_kind

        metrics = find_kind(str(config["task.kind"])).metrics
        known = {name: direction is Direction.LOWER for name, direction in metrics.items()}
        default = str(config["task.metric"])
    else:
        corpora = [key.removeprefix("corpus.eval.") for key in config if key.startswith("corpus.eval.")]
        kinds = {"loss": True, "perplexity": True, "accuracy": False}
        known = {f"eval/{name}/{kind}": lower for name in corpora for kind, lower in kinds.items()} | {"loss": True}
        default = next(iter(known))
    chosen = requested or default
    if chosen not in known:
        raise UserError(f"--metric: the runs do not report '{chosen}'{did_you_mean(chosen, known)}")
    return chosen, known[chosen]
