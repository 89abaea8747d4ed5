"""The task that the checkpoints of a run are scored on, and scoring one of them in a process of its own."""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from experiment.config import load_config, read_config_file
from experiment.errors import UserError, user_errors_in
from experiment.files import json_digest, read_json, removed_on_error
from experiment.process.own_process import deepcloze_command, module_command
from experiment.run_files.checkpoints import checkpoint_step, files_below, link_model, verify, verify_name
from experiment.run_files.downstream import DownstreamResult
from experiment.run_files.run_folder import RunFolder, folder_name
from experiment.run_files.run_lock import folder_use
from finetune.config import CHANGE_ROUNDING_ONLY, FinetuneConfig, ModelConfig, TrainingConfig, check_validation
from finetune.data.task_config import TaskConfig, data_checksums
from finetune.task_kind import find_kind
from launcher.run_sets.child_run import DONE, REJECTED, ChildRun, start, wait_for_other_process
from launcher.run_sets.run_set import CONFIG_COPIES, check_unchanged, write_copy

_PROBED_KIND = "classification"
_REPLACED = {
    "model.weights": "pretrained",
    "task.test": "null",
    "run.keep": "none",
    "tracking.wandb": "disabled",
    "tracking.tensorboard": "false",
    "tracking.artifacts": "false",
    "tracking.alerts.email": "null",
    "tracking.alerts.webhook": "false",
    "tracking.alerts.apprise": "false",
    "tracking.alerts.wandb": "false",
}
"""Overrides of the task's config. Test is not even read: it must not guide decisions during pretraining."""
_NEWER_KEYS = ("adam_eps", "grad_clip", "warmup_steps", "score_train", "eval_batch_size", "parallel_seeds")
"""Keys of `training` that version 0.2.0 lacks: scores with their defaults continue its scores."""


class ScoringError(Exception):
    """A checkpoint could not be scored; the message says why."""


class TaskRejectedError(ScoringError):
    """The task or its data are invalid, as the process that scores has reported."""


@dataclass(frozen=True)
class WatchedTask:
    """A task, and how it is scored."""

    file: str
    name: str  # of its folder and metrics; ends with -probe if it is probed
    probe: bool
    metric: str  # the primary one
    lower_is_better: bool
    config: str  # identifies the settings and the data that the scores depend on
    data: TaskConfig  # with absolute paths, and the commits of data sets of the Hub
    checksums: Mapping[str, str]  # of the data, by split
    content: bytes = field(compare=False)  # of the file, which the user may edit meanwhile


def read_watched_task(file: str, probe: bool) -> WatchedTask:
    """Read a task. Raises UserError for a config that cannot be scored on validation."""
    content = read_config_file(file)
    config = load_config(FinetuneConfig, file, {**_REPLACED, "run.dir": ".", "model.init_from": "."})
    check_unchanged({file: content})
    with user_errors_in(file):
        check_validation(config, "checkpoints are scored on validation")
        task = config.task.pinned()
    if probe and task.kind != _PROBED_KIND:
        raise UserError(f"{file}: task.kind: --probe needs a task of kind '{_PROBED_KIND}', found '{task.kind}'")
    name = folder_name(task.name or Path(file).stem)
    if not name:
        raise UserError(f"{file}: task.name: expected a name with letters or digits, found '{task.name}'")
    settings = config.model_dump(mode="json", exclude={"run": True, "tracking": True, "task": {"name"}})
    for key in _NEWER_KEYS:
        if key in CHANGE_ROUNDING_ONLY or settings["training"][key] == TrainingConfig.model_fields[key].default:
            del settings["training"][key]
    for key in ("pooling", "config"):  # which version 0.2.0 lacks, too
        if getattr(config.model, key) == ModelConfig.model_fields[key].default:
            del settings["model"][key]
    with user_errors_in(file):
        settings["data"] = checksums = data_checksums(task)
    if task.kind == "multi_label" and task.validation is None:  # version 0.2.0 draws other rows
        settings["drawn"] = "by the rarest label"
    if probe:
        name = f"{name}-probe"
        del settings["training"]
    lower_is_better = task.metric in find_kind(task.kind).lower_is_better
    return WatchedTask(file, name, probe, task.metric, lower_is_better, json_digest(settings), task, checksums, content)


def score_checkpoint(checkpoint: Path, weights: str, task: WatchedTask, run: RunFolder) -> DownstreamResult:
    """Score a complete checkpoint, which may be deleted meanwhile. weights: see `checkpoints.weights_digest`.

    An interrupted fine-tuning resumes. Raises ScoringError, TaskRejectedError, OSError if the checkpoint is deleted
    before it is linked, StoppedError if the process that scores was stopped, and UserError if the data were changed.
    """
    start_time = time.monotonic()
    try:
        is_changed = data_checksums(task.data) != task.checksums
    except UserError as error:  # of the disk: it may pass
        raise ScoringError(str(error)) from None
    if is_changed:
        raise UserError(
            f"{task.file}: the data were changed after this watch had begun, so that scores would not be comparable "
            "with earlier ones; restore them, or set task.name to another name"
        )
    work = run.downstream / task.name / "work"
    folder = work / f"{checkpoint.name}-{json_digest([weights, task.config])[:12]}"  # the same only if it can resume
    _remove_leftovers(work, folder)
    with removed_on_error(folder):
        link_model(checkpoint, folder)
        try:
            problem = verify(folder, files_below("hf")) or verify_name(checkpoint)
        except UserError as error:  # of the disk: it may pass
            raise ScoringError(str(error)) from None
        if problem:
            raise ScoringError(f"the checkpoint is damaged: {problem}")
    step = checkpoint_step(checkpoint)
    argv = _argv_with_copy(task, folder)
    child = ChildRun("watch", f"{task.name}: step {step}", RunFolder(folder / "run"), argv, shows_results=False)
    wait_for_other_process(child)
    if (state := start(child)) != DONE:
        raise TaskRejectedError(state) if state == REJECTED else ScoringError(state)
    metrics, collapsed = _read_results(child.folder.results)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty: what `_remove_leftovers` keeps
        work.rmdir()
    seconds = round(time.monotonic() - start_time, 1)
    scored = (metrics, weights, task.config, seconds, collapsed)
    return DownstreamResult(step, task.name, task.metric, task.lower_is_better, *scored)


def _remove_leftovers(work: Path, kept: Path) -> None:
    """Remove the folders of a killed watch, unless its last process still runs."""
    for folder in work.glob("*"):
        if folder != kept and not folder_use(RunFolder(folder / "run")).alive:
            shutil.rmtree(folder, ignore_errors=True)


def _argv_with_copy(task: WatchedTask, folder: Path) -> tuple[str, ...]:
    """Write a copy of the task's config to `folder`, and return the command that scores the model in it."""
    config = str(write_copy(task.file, task.content, folder / CONFIG_COPIES))
    overrides = {**_REPLACED, **task.data.hub_overrides()}
    overrides |= {"model.init_from": str(folder / "hf"), "run.dir": str(folder / "run")}
    if task.probe:
        return (*module_command("finetune.probe"), config, *(f"{key}={value}" for key, value in overrides.items()))
    return deepcloze_command("finetune", config, overrides)


def _read_results(path: Path) -> tuple[dict[str, float], int]:
    """Read metric -> its mean over the seeds on validation; and how many seeds have collapsed. Raises ScoringError."""
    try:
        results = read_json(path)
        scores = {metric: found["mean"] for metric, found in results["splits"]["validation"].items()}
        return scores, len(results.get("collapsed", ()))  # a probe has no seeds
    except (OSError, ValueError, KeyError, TypeError):
        raise ScoringError(f"{path} has no scores on validation; has the split labels?") from None
