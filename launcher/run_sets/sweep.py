"""`deepcloze sweep`: validate each point of a grid, run one after the other, and write one table.

OUTPUT/sweep.json is the record of the runs.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiment.config import FlatConfig, did_you_mean, flatten, load_config, read_config_file
from experiment.errors import UserError, user_errors_in
from experiment.files import json_digest
from experiment.process.own_process import deepcloze_command
from experiment.results.sweep_summary import (
    metric_title,
    read_metric,
    read_sweep_results,
    short_names,
    sort_results,
    write_summary,
)
from experiment.run_files.run_folder import SWEEP_RECORD, RunFolder, check_run_folder
from experiment.storage import is_url
from finetune.config import FinetuneConfig, check_validation
from finetune.data.columns import CONTEXT, LABEL
from finetune.task_kind import find_kind
from launcher.configs import command_of
from launcher.options import LaunchOptions, SweepOptions
from launcher.run_sets.recorded_runs import (
    record_model_of_set,
    record_parent_of_set,
    recorded_configs,
    recorded_data,
    resume_overrides,
)
from launcher.run_sets.run_set import PlannedRun, RunSet
from launcher.run_sets.validation import data_origin, encoder_origin, validate_finetuning, validate_pretraining
from pretrain.config import PretrainConfig

_CLOSING = {"[": "]", "{": "}"}
_QUOTES = ("'", '"')
_LONGEST_NAME = 240  # bytes of a folder name; file systems allow 255
_UNSAFE = re.compile(r"[^\w.+-]+")  # not allowed in a folder name


@dataclass(frozen=True)
class SweepPlan:
    """The validated runs of a sweep, and the metric to compare them by."""

    runs: RunSet
    metric: str
    lower_is_better: bool


def run_sweep(plan: SweepPlan) -> None:
    """Run the missing runs, then write OUTPUT/sweep.{json,csv,png} and print the table.

    Raises UserError if OUTPUT is in use or has runs of other configs, StoppedError if a signal, a run's own STOP file
    or a full disk stops it early, and SystemExit if runs failed, after all others have been run.
    """
    runs, output = plan.runs, plan.runs.folder.path
    selects_best = all(run.config.get("evaluation.best_metric") == plan.metric for run in runs.runs)
    measure = partial(read_metric, metric=plan.metric, lower_is_better=plan.lower_is_better if selects_best else None)
    with runs.opened() as records:
        runs.finish(records, measure)
        results = read_sweep_results(runs.folder, {run.name: records[run.name] for run in runs.runs}, plan.metric)
        best_first = sort_results(results, plan.lower_is_better)
        runs.save(records, best=best_first[0].name if best_first[0].value is not None else None)
        write_summary(best_first, output, metric_title(plan.metric, runs.runs[0].config))
        from launcher.report import print_report  # matplotlib takes a second

        print_report("sweep", output)


def plan_sweep(options: SweepOptions) -> SweepPlan:
    """Validate all points of the grid. Writes and starts nothing.

    Raises UserError for anything that would keep one of the runs from starting, except for the content of the data of
    fine-tuning, which would have to be read and tokenized for each point.
    """
    config, content = options.config, read_config_file(options.config)
    finetuning = command_of(config) == "finetune"
    placement = options.model_dump(include=set(LaunchOptions.model_fields), exclude_defaults=True)
    if finetuning and placement:
        raise UserError(f"--{next(iter(placement))} applies to pretraining only; {config} is a fine-tuning config")
    points = read_grid(options.grid, options.overrides)
    config_type: type[FinetuneConfig | PretrainConfig] = FinetuneConfig if finetuning else PretrainConfig
    output = options.output
    if output is None:  # the folder that the config names may be in use: no run of the sweep writes to it
        name, values = next(iter(points.items()))
        with user_errors_in(f"sweep: {name}"):
            output = f"{Path(load_config(config_type, config, options.overrides | values).run.dir)}-sweep"
    folder = RunFolder(Path(output).absolute())
    check_run_folder(folder, None, "--output")
    recorded = recorded_configs(folder.path / SWEEP_RECORD, "--output")
    pins, runs = _Pins(folder.path, recorded, points), []
    loaded: dict[str, FinetuneConfig | PretrainConfig] = {}
    models: set[str] = set()
    for name, values in points.items():
        overrides = options.overrides | values | {"run.dir": str(folder.path / name)}
        with user_errors_in(f"sweep: {name}"):
            loaded[name] = load_config(config_type, config, overrides)
            check_points(name, loaded, options.metric)
            pinned = pins.overrides(loaded[name], name)
            if "task.test" in pinned:  # it has all of them; a key below it would come after it
                overrides = {key: text for key, text in overrides.items() if not key.startswith("task.test.")}
            overrides |= pinned
            validated: FlatConfig
            if finetuning:
                run = validate_finetuning(config, overrides, models)
                model = run.model
                validated = {**flatten(run), **data_origin(run.task), **encoder_origin(model.init_from, model.weights)}
            else:
                validated = validate_pretraining(config, overrides, placement, name in recorded)
        argv = deepcloze_command("finetune" if finetuning else "pretrain", config, {**placement, **overrides})
        runs.append(PlannedRun(name, argv, validated, values=values))
    metric, lower_is_better = _choose_metric(options.metric, runs[0].config, finetuning)
    header = {"metric": metric, "lower_is_better": lower_is_better}
    run_set = RunSet("sweep", folder, "--output", SWEEP_RECORD, tuple(runs), header, {config: content})
    return SweepPlan(run_set, metric, lower_is_better)


def check_points(name: str, points: Mapping[str, FinetuneConfig | PretrainConfig], metric: str | None = None) -> None:
    """Raise UserError if another point has the same config as this one, as for the values 1e-3 and 0.001; if this one
    is fine-tuned without a validation split; or if the first one is evaluated in another way or on other text. metric:
    that the user asks for; None: that of the first one."""
    point, (first_name, first) = points[name], next(iter(points.items()))
    for other, config in points.items():
        moved = config.model_copy(update={"run": config.run.model_copy(update={"dir": point.run.dir})})
        if other != name and moved == point:
            raise UserError(f"same config as {other}; leave one of them out of the grid")
    if isinstance(point, FinetuneConfig):
        check_validation(point, "the points of a grid are compared on validation")
        advice = "the points would be scored on different rows; leave it out of the grid"
        advice += ", or set task.validation to a file" if point.task.validation is None else ""
    else:
        advice = (
            "the metrics depend on it, so these points cannot be compared by them; compare the models on tasks with "
            "`deepcloze compare`, a row for each"
        )
    if metric is None and isinstance(first, FinetuneConfig):
        metric = first.task.metric
    before, now = _evaluation_settings(first, metric), _evaluation_settings(point, metric)
    if changed := [key for key in {**before, **now} if now.get(key) != before.get(key)]:
        key = changed[0]
        raise UserError(f"{key} is {now.get(key)}, but {before.get(key)} in {first_name}: {advice}")


def _evaluation_settings(config: FinetuneConfig | PretrainConfig, metric: str | None) -> dict[str, object]:
    """Return the keys that select the rows of the validation split, or that the metrics of pretraining depend on: of
    several masking rates the last one, as in evaluations; for the metric `loss` the corpora that it is computed on."""
    if isinstance(config, FinetuneConfig):
        task, read = config.task, {"validation", "on_bad_lines", "labels", "header", "quoting"}
        ranks = metric in ("mrr", "ndcg@10")  # the negatives of all rows
        candidates = {"columns.negative": getattr(task.columns, "negative", None)} if ranks else {}
        if task.validation is not None:
            return flatten({"task": {**task.model_dump(include=read), **candidates}})
        drawn = task.model_dump(include={*read, "train", "validation_share", "split_seed"}) | candidates
        drawn |= {f"columns.{role}": getattr(task.columns, role) for role in task.columns.roles(CONTEXT, LABEL)}
        return flatten({"task": {**drawn, "dialogue.group": task.dialogue and task.dialogue.group}})
    masking = config.masking.model_dump(exclude={"schedule"}) | {"rate": config.masking.rates[-1]}
    by_loss = metric == "loss" or not config.corpus.eval
    corpora = config.corpus.model_dump(include={"eval", "train"} if by_loss else {"eval"})
    return flatten({"masking": masking, "batch": {"max_seq_length": config.batch.max_seq_length}, "corpus": corpora})


class _Pins:
    """Overrides that give all points of a sweep the same commits of a model and data sets of the Hub and the same
    checkpoint of a run, which may save newer ones; and each its own mirror."""

    def __init__(
        self, folder: Path, configs: Mapping[str, FlatConfig], points: Mapping[str, Mapping[str, str]]
    ) -> None:
        """folder: of the sweep. configs: `recorded_configs` of it. points: name -> values of the grid."""
        self._folder, self._configs, self._points = folder, configs, points
        self._models: dict[str, str] = {}  # `model.init_from` -> pinned
        self._parents: dict[str, str] = {}  # `run.resume` -> pinned
        self._data = recorded_data(self._configs)  # pinned

    def overrides(self, config: FinetuneConfig | PretrainConfig, point: str) -> dict[str, str]:
        """Return the overrides of a point. config: without them. Raises UserError."""
        pinned, init_from = dict[str, str](), config.model.init_from
        if isinstance(config, FinetuneConfig):
            task = config.task.pinned(self._data)
            self._data += task.files().values()
            pinned |= task.hub_overrides()
        else:
            if config.checkpoint.mirror is not None and "checkpoint.mirror" not in self._points[point]:
                pinned["checkpoint.mirror"] = f"{config.checkpoint.mirror}/{point}"
            resume, parent = config.run.resume, config.run.parent
            if parent is not None:
                if resume not in self._parents:
                    self._parents[resume] = record_parent_of_set(resume, parent, self._recorded("run.resume", point))
                pinned["run.resume"] = self._parents[resume]
            else:
                pinned |= resume_overrides(resume, point, self._folder, self._configs)
        if init_from is not None and (isinstance(config, FinetuneConfig) or self._pins_model(config, init_from)):
            if init_from not in self._models:
                same = self._recorded("model.init_from", point)
                with user_errors_in("model.init_from"):
                    self._models[init_from] = record_model_of_set(init_from, self._configs, same)
            pinned["model.init_from"] = self._models[init_from]
        return pinned

    def _recorded(self, key: str, point: str) -> list[FlatConfig]:
        """Return the recorded configs of the points that have the same value of a key as this one."""
        value = self._points[point].get(key)  # None: no key of the grid, and so the same for all
        return [found for name, found in self._configs.items() if self._points.get(name, {}).get(key) == value]

    def _pins_model(self, config: PretrainConfig, init_from: str) -> bool:
        """Return whether points start from a checkpoint or commit: not forks, which have the weights of their parents,
        nor URLs, which are rejected, nor points of version 0.2.0, which recorded the name of a run."""
        is_recorded = any(found.get("model.init_from") == init_from for found in self._configs.values())
        return config.run.parent is None and not is_url(init_from) and not is_recorded


def _choose_metric(requested: str | None, config: FlatConfig, finetuning: bool) -> tuple[str, bool]:
    """Return the metric to compare runs by, and whether lower is better. Raises UserError for one that runs do not
    report."""
    if finetuning:
        kind = find_kind(str(config["task.kind"]))
        known = {name: name in kind.lower_is_better for name in kind.metrics()}
        default = str(config["task.metric"])
    else:
        corpora = [key.removeprefix("corpus.eval.") for key in config if key.startswith("corpus.eval.")]
        kinds = {"loss": True, "perplexity": True, "accuracy": False}
        known = {f"eval/{name}/{kind}": lower for name in corpora for kind, lower in kinds.items()} | {"loss": True}
        default = next(iter(known))
    if (chosen := requested or default) not in known:
        raise UserError(f"--metric: the runs do not report '{chosen}'{did_you_mean(chosen, known)}")
    return chosen, known[chosen]


def read_grid(text: str, overrides: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the points of a grid, see `grid_points`. overrides: of all points. Raises UserError."""
    grid = parse_grid(text)
    if key := next((key for key in grid if key in overrides), None):
        raise UserError(f"--grid: '{key}' is set to {overrides[key]} for all points; leave it out of the grid")
    return grid_points(grid)


def parse_grid(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `optimizer.lr=1e-4,5e-4 schedule.epochs=1,2`: spaces separate keys, commas values; lists need brackets.
    Raises UserError."""
    grid: dict[str, tuple[str, ...]] = {}
    for part in filter(None, _split(text, " \t\n")):
        key, equals, listed = part.partition("=")
        values = tuple(value.strip() for value in _split(listed, ","))
        if not (equals and key) or not all(values):
            raise UserError(f"--grid: expected SECTION.KEY=VALUE,VALUE,…, found '{part}'")
        if key == "run.dir":
            raise UserError("--grid: run.dir is set for each run; choose the folder of all runs with --output")
        if key in grid:
            raise UserError(f"--grid: '{key}' is given twice")
        if len(set(values)) < len(values):
            raise UserError(f"--grid: '{key}' has a duplicate value: {listed}")
        grid[key] = values
    if not grid:
        raise UserError("--grid: expected SECTION.KEY=VALUE,VALUE,…, found nothing")
    return grid


def grid_points(grid: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """{readable unique name: {key: value}} for each point of a grid, key -> values; the last key changes fastest."""
    labels = short_names(list(grid))
    points: dict[str, dict[str, str]] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(f"{labels[key]}={_label(value)}" for key, value in point.items())
        if len(name.encode()) > _LONGEST_NAME:
            name = f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{json_digest(point)[:8]}"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        points[next(candidate for candidate in candidates if candidate not in points)] = point
    return points


def _label(value: str) -> str:
    """Return a value as a part of a folder name. A number keeps its sign."""
    return _UNSAFE.sub("-", value).strip("-") if _UNSAFE.search(value) else value


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside of brackets and quotes. Raises UserError for a missing bracket or quote."""
    parts, expected = [""], ""  # expected: the closing brackets and quotes still to come, innermost last
    for character in text:
        if expected and character == expected[-1]:
            expected = expected[:-1]
        elif character in _CLOSING and expected[-1:] not in _QUOTES:
            expected += _CLOSING[character]
        elif character in _QUOTES and expected[-1:] not in _QUOTES:
            expected += character
        elif not expected and character in separators:
            parts.append("")
            continue
        parts[-1] += character
    if expected:
        raise UserError(f"--grid: '{expected[-1]}' is missing in '{parts[-1]}'")
    return parts
