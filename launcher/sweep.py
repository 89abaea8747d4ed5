"""`deepcloze sweep`: every point of a grid is checked as the run it will be, before the first one starts."""

import contextlib
import io
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from experiment.config import flatten, load_config, nearest
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from experiment.results.sweep import Run, combinations, parse_grid, sweep

Resolve = Callable[[Mapping[str, str]], dict[str, Any]]
"""Config overrides -> the whole config, flat. Raises UserError for what would keep the run from starting."""


def launch_sweep(
    config: str,
    overrides: Mapping[str, str],
    grid: str,
    *,
    output: str | None = None,
    metric: str | None = None,
    dry_run: bool = False,
    **placement: Any,
) -> None:
    """Run the config at every point of the grid, whether it pretrains or fine-tunes.

    `placement`: flags of `deepcloze pretrain` (num_gpus, hostfile …), passed on. `dry_run` prints the commands and
    starts nothing. Raises as `experiment.results.sweep.sweep`, and UserError for what any run would be refused for.
    """
    finetuning = _is_finetuning(config)
    given = {name: value for name, value in placement.items() if value not in (None, False)}
    if finetuning and given:
        raise UserError(f"--{next(iter(given))} belongs to pretraining; {config} is a fine-tuning")
    points = combinations(parse_grid(grid))
    if twice := [key for key in next(iter(points.values())) if key in overrides]:
        raise UserError(f"'{twice[0]}' stands in --grid and on the command line")
    resolve: Resolve = _finetuning(config) if finetuning else _pretraining(config, given)
    command = [sys.executable, "-m", "launcher", "finetune" if finetuning else "pretrain", "--config", config]
    command += [f"--{name}={value}" for name, value in given.items()]

    runs = []
    for name, values in points.items():
        try:
            if output is None:
                output = f"{_run_dir(config, {**overrides, **values}, finetuning)}-sweep"
            settings = {**overrides, **values, "run.dir": str(Path(output).absolute() / name)}
            resolved = resolve(settings)
        except UserError as error:
            raise UserError(f"sweep: {name}: {error}") from None
        runs.append(Run(name, values, [*command, *(f"--{key}={text}" for key, text in settings.items())], resolved))
    assert output is not None
    metric = _metric(metric, runs[0].config, finetuning)
    if dry_run:
        print("\n".join(shlex.join(run.argv) for run in runs))
        return
    sweep(runs, Path(output).absolute(), metric)


def _run_dir(config: str, overrides: Mapping[str, str], finetuning: bool) -> str:
    """The run folder that the config names, which may be in use: no run of the sweep goes there."""
    from pretrain.config import PretrainConfig

    if finetuning:
        return str(_finetuning(config)(overrides)["run.dir"])
    return load_config(PretrainConfig, config, overrides).run.dir


def _pretraining(config: str, placement: Mapping[str, Any]) -> Resolve:
    from launcher.launch import launch_pretraining
    from pretrain.config import PretrainConfig

    def resolve(overrides: Mapping[str, str]) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            launch_pretraining(config, overrides, dry_run=True, **placement)
        return flatten(load_config(PretrainConfig, config, overrides))

    return resolve


def _finetuning(config: str) -> Resolve:
    from finetune.config import FinetuneConfig
    from finetune.run import resolve_paths

    def resolve(overrides: Mapping[str, str]) -> dict[str, Any]:
        return flatten(resolve_paths(load_config(FinetuneConfig, config, overrides), default_name=Path(config).stem))

    return resolve


def _is_finetuning(config: str) -> bool:
    try:
        tree = read_yaml(Path(config).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # the message is `load_config`'s
    return isinstance(tree, dict) and "task" in tree


def _metric(named: str | None, config: Mapping[str, Any], finetuning: bool) -> str:
    """What the runs are compared by. Raises UserError for a metric that they will not have."""
    if finetuning:
        from finetune.config import MetricName

        default, known = str(config["task.metric"]), [str(name) for name in get_args(MetricName)]
    else:
        corpora = [key.removeprefix("corpus.eval.") for key in config if key.startswith("corpus.eval.")]
        known = [*(f"eval/{name}/{kind}" for name in corpora for kind in ("loss", "perplexity", "accuracy")), "loss"]
        default = known[0]
    if named is not None and named not in known:
        raise UserError(f"--metric: no run will have '{named}'{nearest(named, known)}")
    return named or default
