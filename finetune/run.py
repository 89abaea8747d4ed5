"""`deepcloze finetune`: from a config to the scores of one task with one or more seeds.

1. Resolve the config: read the data, inspect the model.
2. For each seed: build the model, train it, keep the weights that are best on validation, predict. A seed's folder
   appears when it is complete; a restarted run trains only the missing seeds, and resumes one that was interrupted.
3. Combine the seeds: results.json, confusion.png, curves.png, a table.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiment.config import dump_config, flatten
from experiment.errors import StoppedError, stopped_by_disk_errors
from experiment.files import remove_unfinished, write_text
from experiment.formatting import counted, describe_duration
from experiment.process.hardware import prepare_process
from experiment.progress import print_warning, terminal
from experiment.results.main_score import count_collapsed
from experiment.run_files.metrics_file import read_events
from experiment.run_files.outcome_file import Outcome, recorded_outcome
from experiment.run_files.provenance import (
    ancestors_of,
    collect_provenance,
    has_logged_with_other_config,
    other_version,
    separate_copy,
    wandb_id,
    write_provenance,
)
from experiment.run_files.run_folder import RunFolder, check_creatable, open_run_folder
from experiment.run_files.run_lock import check_unlocked, lock_run
from experiment.tracking.rank_logs import logging_set_up
from experiment.tracking.tracker import TrackedRun, Tracker, open_trackers
from finetune.config import CHANGE_ROUNDING_ONLY, FinetuneConfig
from finetune.parallel_seeds import count_logged, log_events_of_process, move_events_to_end, train_seeds_in_parallel
from finetune.resolve import OF_DATA_AND_MODEL, ResolvedRun, config_settings, load_run_config, resolve
from finetune.results.finetuned_card import add_seed_scores
from finetune.results.seed_summary import SeedRecord, write_results
from finetune.results.tables import print_results
from finetune.seed_run import describe_differences, read_finished_seeds, remove_state, state_file, train_seed
from finetune.training.fit import DivergedError, Log

# Beginnings of the keys of a config that do not change the curves of a run.
_SAME_RESULT = ("run.", "tracking.", *(f"training.{key}" for key in CHANGE_ROUNDING_ONLY))


def finetune(config: str | Path, overrides: Mapping[str, str] | None = None, dry_run: bool = False) -> None:
    """Run the command. config: a YAML file; overrides: dotted keys to raw text. Raises UserError.

    dry_run: only print the plan.
    """
    loaded = load_run_config(config, overrides)
    if dry_run:
        print(f"# config\n{dump_config(loaded)}")
        print(_describe_training(_resolve(loaded)))
    else:
        folder, start = RunFolder(Path(loaded.run.dir)), time.monotonic()
        results = run(loaded)
        print_results(results, folder.results)
        terminal().print(f"done: {describe_duration(time.monotonic() - start)} in this command")
        has_collapsed = count_collapsed(results, "validation") == len(results["seeds"])
        if any(folder.path.glob("seed-*/model")) and not has_collapsed:
            model = shlex.quote(str(folder.path))
            commands = f"deepcloze predict --model {model} --input FILE --output FILE; deepcloze serve --model {model}"
            terminal().print(f"next: {commands}")


def check(config: str | Path, overrides: Mapping[str, str] | None = None) -> None:
    """Raise UserError for anything that would keep `finetune` from training. Prints warnings about the data."""
    _resolve(load_run_config(config, overrides))


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Train and score the run of a config of `load_run_config`. Returns the content of results.json.

    Raises UserError, also if the disk cannot be written, StoppedError if it is full after training has begun, and
    SystemExit if a seed fails.
    """
    prepare_process()
    folder = RunFolder(Path(config.run.dir))
    dead = check_unlocked(folder)  # before the data is read, which may take minutes
    check_creatable(folder)
    resolved = _resolve(config)
    open_run_folder(folder.path)
    with lock_run(folder, dead=dead), recorded_outcome(folder), logging_set_up(folder):
        for written in (folder.path, folder.logs, *folder.path.glob(".seed-*"), *folder.path.glob("seed-*/model")):
            remove_unfinished(written)  # what a killed process has left
        return _train_and_score(config, resolved)


def _resolve(config: FinetuneConfig) -> ResolvedRun:
    """Like `resolve`, but compare the training of finished seeds with the config before the data is read."""
    read_finished_seeds(RunFolder(Path(config.run.dir)), config_settings(config), OF_DATA_AND_MODEL)
    return resolve(config)


def _train_and_score(config: FinetuneConfig, resolved: ResolvedRun) -> dict[str, Any]:
    """Train and score all seeds. config: to be written to the run folder and to trackers."""
    folder, model, seeds = resolved.folder, resolved.model, resolved.training.seeds
    finished = read_finished_seeds(folder, resolved.settings)
    for seed in finished:
        remove_state(seed, folder)
    is_other_config = has_logged_with_other_config(folder, config, _SAME_RESULT)
    ancestors = ancestors_of(model.folder, "init_from") if model.pretrained else []
    records = {seed: finished[seed] for seed in seeds if seed in finished}
    order = _in_order_of_events(seeds, folder)
    missing = [seed for seed in order if seed in seeds and seed not in finished]
    left_out = [seed for seed in finished if seed not in seeds and resolved.task.kind.config.is_trained]
    for line in (*_describe_finished(list(records), left_out, resolved), *_describe_gpus(missing, resolved)):
        terminal().print(line)
    changed = {seed: found for seed in missing if (found := state_file(seed, resolved).other_settings())}
    for seed, found in changed.items():
        differences = describe_differences(found)
        terminal().print(f"seed {seed} starts over: it was stopped with other settings: {differences}")
    resumed = {seed: state_file(seed, resolved).steps for seed in missing}
    if missing and (records or any(resumed.values())) and (version := other_version(folder)) is not None:
        print_warning(
            f"seeds were trained with deepcloze {version}: what this version trains may have other scores; "
            "choose another run.dir to train all seeds with this version"
        )
    started = resumed[missing[0]] if missing else 0
    if started:
        terminal().print(f"seed {missing[0]}: resuming after step {started:,}")
    kept = [seed for seed in order if seed not in missing]
    if order[: len(kept)] != kept:
        move_events_to_end(order, missing, resolved)
        order, started = [*kept, *missing], 0  # their events are logged again
    steps, total = resolved.steps, resolved.steps * len(order)
    facts = {
        "step": steps * len(kept) + sum(resumed.values()),
        "total_steps": total or None,
        "folder": str(folder.path),
        "starts_over": bool(changed) or (is_other_config and not kept and not started),
    }
    if (first := separate_copy(folder)) is not None:
        print_warning(f"this is a copy of the run in {first}: it gets an id of its own")
    provenance = write_provenance(folder, {**collect_provenance(sys.argv), **facts}, ancestors)
    write_text(folder.config, dump_config(config))
    logged = count_logged(kept, folder)
    if logged < len(kept):
        started = 0
    again = started > 0 and state_file(missing[0], resolved).lacks_evaluation
    tracked = TrackedRun(wandb_id(provenance), flatten(config), total, steps * logged + started, again, steps)
    tracker = open_trackers(config.tracking, folder, tracked, console=not _in_parallel(missing, resolved))
    logs = {seed: _log_from_step(tracker, steps * number) for number, seed in enumerate(order) if seed in seeds}
    with _closed_at_the_end(tracker, folder):
        records |= _train_seeds(missing, resolved, logs)
        results = write_results(resolved, {seed: records[seed] for seed in seeds})
        add_seed_scores(folder, results)
        tracker.summarize(_summary(results))
        return results


def _summary(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the task's metric on each split over the seeds: SPLIT/METRIC, and with several seeds SPLIT/METRIC_std."""
    metric = results["metric"]
    scored = {f"{split}/{metric}": scores[metric] for split, scores in results["splits"].items() if metric in scores}
    stds = {f"{name}_std": scores["std"] for name, scores in scored.items() if scores["std"] is not None}
    return {name: scores["mean"] for name, scores in scored.items()} | stds


def _in_order_of_events(seeds: Sequence[int], folder: RunFolder) -> list[int]:
    """Return the seeds of a run, and seeds that it no longer has but has logged. Logged seeds keep their places."""
    logged = (event["seed"] for event in read_events(folder.metrics) if isinstance(event.get("seed"), int))
    return list(dict.fromkeys([*logged, *seeds]))


@contextmanager
def _closed_at_the_end(tracker: Tracker, folder: RunFolder) -> Iterator[None]:
    """Close the tracker with the run's outcome. Raises StoppedError in place of disk errors that may pass."""
    outcome = Outcome.FAILED
    try:
        with stopped_by_disk_errors(f"run.dir {folder.path}: "):
            yield
        outcome = Outcome.DONE
    except (KeyboardInterrupt, StoppedError):
        outcome = Outcome.STOPPED
        raise
    finally:
        tracker.close(outcome)


def _train_seeds(missing: Sequence[int], resolved: ResolvedRun, logs: Mapping[int, Log]) -> dict[int, SeedRecord]:
    """Train the missing seeds. Raises SystemExit if one fails. logs: of all seeds, in the order of their events."""
    if _in_parallel(missing, resolved):
        return train_seeds_in_parallel(resolved, logs)
    records = {}
    for seed, log in logs.items():
        log_events_of_process(seed, resolved, log)
        if seed in missing:
            try:
                records[seed] = train_seed(seed, resolved, log)
            except DivergedError as error:
                sys.exit(f"deepcloze: {error}")
    return records


def _in_parallel(seeds: Sequence[int], resolved: ResolvedRun) -> bool:
    return min(resolved.training.parallel_seeds, len(seeds)) > 1


def _describe_finished(seeds: Sequence[int], left_out: Sequence[int], resolved: ResolvedRun) -> list[str]:
    """Return lines on the seeds that are not trained again. left_out: those that the config does not name."""
    folder = resolved.folder
    lines = [f"already finished in {folder.path}: seed {', '.join(map(str, seeds))}"] if seeds else []
    if left_out:
        lines.append(f"finished, but not one of training.seeds: seed {', '.join(map(str, left_out))}")
    folders = [f"seed-{seed}" for seed in seeds if not (folder.seed_folder(seed) / "model").exists()]
    if folders and resolved.keep != "none":
        lines.append(f"finished without a model: {', '.join(folders)}; remove these folders to train and keep one")
    return lines


def _describe_gpus(missing: Sequence[int], resolved: ResolvedRun) -> list[str]:
    """Return a line if seeds are trained one after the other although there are several GPUs."""
    count = torch.cuda.device_count()
    one_by_one = len(missing) > 1 and not _in_parallel(missing, resolved)
    return [f"using 1 of {count} GPUs: see training.parallel_seeds"] if count > 1 and one_by_one else []


def _describe_training(resolved: ResolvedRun) -> str:
    training = resolved.training
    if not resolved.task.kind.config.is_trained:
        return "nothing is trained: the splits are only scored"
    each = f" for each of {len(training.seeds)} seeds" if len(training.seeds) > 1 else ""
    return f"{counted(resolved.steps, 'update')} of {counted(training.batch_size, 'example')}{each}"


def _log_from_step(tracker: Tracker, first: int) -> Log:
    """Log a seed's steps counted from `first`, so that the seeds of a run share one time axis."""
    return lambda step, figures: tracker.log({"step": first + step, **figures})
