"""Sets of runs: commands that are started one after the other, each with a run folder of its own.

`deepcloze sweep` and `compare` plan a `RunSet` and finish it; `deepcloze watch` starts single runs. A record in the
folder of the set keeps the config of each run and how it ended, so that a restarted command runs the missing ones and
does not mix in runs of another config. Runs read copies of config files, as they were planned: the user may edit a file
meanwhile. A run that a killed command has left is waited for.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

from experiment.config import FlatConfig, read_config_file
from experiment.errors import UserError, inform, notify, stopped_by_disk_errors
from experiment.files import read_json, write_file, write_json
from experiment.formatting import shorten
from experiment.process.own_process import module_command
from experiment.run_files.outcome_file import Outcome, read_outcome, recorded_outcome
from experiment.run_files.provenance import other_version
from experiment.run_files.run_folder import SWEEP_RECORD, RunFolder, open_run_folder, planned_folders
from experiment.run_files.run_lock import lock_run
from experiment.tracking.config import RUN_SET, WANDB_GROUP, WANDB_NAME
from finetune.config import PATHS
from launcher.run_sets.child_run import DONE, ChildRun, start, wait_for_other_process
from launcher.run_sets.recorded_runs import SEEDS, find_change, read_record, recorded_configs, with_new_keys

CONFIG_COPIES = "configs"
"""Folder of the copies of config files, in the folder of the set."""

_NAMES = 100  # characters of the names of further runs in a message


@dataclass(frozen=True)
class PlannedRun:
    """A run of a set. Its folder is the one of that name in the folder of the set."""

    name: str
    argv: tuple[str, ...]  # the command that starts or resumes it
    config: FlatConfig  # everything that its results depend on
    pretraining: str | None = None  # name of the run that must be done before
    values: Mapping[str, str] = field(default_factory=dict)  # point of a grid: dotted config key -> raw text


class RunRecord(TypedDict):
    """A run in the record of its set."""

    config: FlatConfig
    values: NotRequired[Mapping[str, str]]
    state: NotRequired[str]  # `DONE`, or how it failed; missing if it has not ended
    value: NotRequired[float | None]  # result of `measure`
    removed: NotRequired[bool]  # from the plan; the folder is still there


@dataclass(frozen=True)
class RunSet:
    """Runs to finish."""

    command: str  # for messages: "sweep"
    folder: RunFolder
    option: str  # that names the folder, for messages
    record: str  # name of the record in the folder
    runs: tuple[PlannedRun, ...]
    header: Mapping[str, object] | None = None  # other content of the record; None: it consists of the runs
    configs: Mapping[str, bytes] = field(default_factory=dict)  # file after --config -> its content when it was planned

    def run_folder(self, run: PlannedRun) -> RunFolder:
        return RunFolder(self.folder.path / run.name)

    def print_commands(self) -> None:
        module = shlex.join(module_command("launcher"))
        print("\n".join(shlex.join(run.argv).replace(module, "deepcloze", 1) for run in self.runs))

    @contextmanager
    def opened(self) -> Iterator[dict[str, RunRecord]]:
        """Lock the folder and read the record: name -> run, also runs of earlier plans.

        At the end, raises SystemExit if runs failed. Raises UserError if another process uses the folder, if runs were
        started with another config, or if a config file was changed; StoppedError in place of errors of the disk that
        may pass.
        """
        check_unchanged(self.configs)
        resumable = stopped_by_disk_errors(f"{self.command}: ")
        with _locked(self.folder, self.option), recorded_outcome(self.folder), resumable:
            records = self._read()
            self.save(records)
            yield records
            if failed := [run.name for run in self.runs if records[run.name].get("state") != DONE]:
                names = ", ".join(failed)
                sys.exit(f"deepcloze: {self.command}: {len(failed)} of {len(self.runs)} runs failed: {names}")

    def finish(self, records: dict[str, RunRecord], measure: Callable[[RunFolder], float | None] | None = None) -> None:
        """Run the missing runs, those that have failed before last, and record how each run ended. Raises StoppedError
        if a run was stopped.

        measure: reads the value of a run that is done. If it raises UserError, that is raised after the last run.
        """
        self._mention_versions()
        damaged: list[UserError] = []
        in_plan = enumerate(self.runs, start=1)
        for number, run in sorted(in_plan, key=lambda numbered: _has_failed(numbered[1], records)):
            record = records[run.name]
            if run.pretraining is not None and records[run.pretraining].get("state") != DONE:
                record["state"] = "not run: its pretraining failed"
            else:
                record["state"] = self._finish(run, f"[{number}/{len(self.runs)}] {run.name}")
            if measure is not None:
                record["value"] = None
                if record["state"] == DONE:
                    try:
                        record["value"] = measure(self.run_folder(run))
                    except UserError as error:
                        damaged.append(error)
            self.save(records)
        if damaged:
            raise damaged[0]

    def save(self, records: Mapping[str, RunRecord], **more: object) -> None:
        content = records if self.header is None else {**self.header, "runs": records, **more}
        write_json(self.folder.path / self.record, content)

    def _mention_versions(self) -> None:
        """Notify if finished runs, or points of them, are of another version of deepcloze than others of this set."""
        pretrainings = {run.pretraining for run in self.runs}
        versions: dict[str, str | None] = {}  # name -> another version; None: this one
        for run in (run for run in self.runs if run.name not in pretrainings):
            folder = self.run_folder(run)
            points = (planned_folders(folder.path) or [folder.path]) if is_finished(run, folder) else []
            versions[run.name] = next(filter(None, (other_version(RunFolder(point)) for point in points)), None)
        if len(set(versions.values())) > 1:
            others = ", ".join(f"{name} ({version})" for name, version in versions.items() if version is not None)
            notify(
                f"{self.command}: kept from another version of deepcloze: {shorten(others, _NAMES)}; "
                f"runs of this version may have other scores: to run these again, remove their folders in "
                f"{self.folder.path}"
            )

    def _finish(self, run: PlannedRun, label: str) -> str:
        child = ChildRun(self.command, label, self.run_folder(run), run.argv, environment=self._names_in_wandb(run))
        wait_for_other_process(child)
        if is_finished(run, child.folder):
            inform(f"{self.command}: {label}: already finished")
            return DONE
        inform(f"{self.command}: {label}: running")
        start_time = time.monotonic()
        state = start(replace(child, argv=self._argv_with_copy(run)))
        inform(f"{self.command}: {label}: {state} after {time.monotonic() - start_time:,.0f} s")
        return state

    def _names_in_wandb(self, run: PlannedRun) -> dict[str, str]:
        """Return the variables that name a run in Weights & Biases, and group it with the others. A sweep that is a
        cell of a comparison has got such variables itself."""
        outer = os.environ.get(WANDB_NAME)
        name = run.name if outer is None else f"{outer}/{run.name}"
        group = os.environ.get(WANDB_GROUP, self.folder.path.name)
        return {WANDB_NAME: name, WANDB_GROUP: group, RUN_SET: "1"}

    def _argv_with_copy(self, run: PlannedRun) -> tuple[str, ...]:
        """Write the copy of the config file for a run, and return the command that reads it."""
        if not self.configs:
            return run.argv
        at = run.argv.index("--config") + 1
        file = run.argv[at]
        copy = write_copy(file, self.configs[file], self.folder.path / CONFIG_COPIES / run.name)
        return (*run.argv[:at], str(copy), *run.argv[at + 1 :])

    def _read(self) -> dict[str, RunRecord]:
        """Return the record, with the runs of this set. A run without a folder has not started, or was removed to run
        again; runs of earlier plans without one are left out.

        Raises UserError if the record is damaged, or if a run was started with another config.
        """
        content = read_record(self.folder.path / self.record, self.option)
        records: dict[str, RunRecord] = content if self.header is None else content.get("runs", {})
        if self.header is not None and any(content.get(key) != value for key, value in self.header.items()):
            for record in records.values():
                record.pop("value", None)  # of another metric
        changes: dict[str, str] = {}
        for run in self.runs:
            new = RunRecord(config=run.config)
            record = records.get(run.name, new) if self.run_folder(run).path.exists() else new
            before = with_new_keys(record["config"], run.config)
            # The folders are moved with the set. `encoder.*` and `data.*` tell the contents of models and data.
            has_content = any(key.startswith("encoder.") for key in record["config"])
            keys = {*before, *run.config} if has_content else ()
            moved = [key for key in keys if PATHS.fullmatch(key.removeprefix("pretrain."))]
            if change := find_change(before, run.config, ["run.dir", *moved]):
                changes[run.name] = change
            if before.get(SEEDS) != run.config.get(SEEDS):
                record = new
            records[run.name] = {**record, "config": run.config}
            if run.values:
                records[run.name]["values"] = run.values
        if changes:
            raise self._refusal(changes)
        planned = {run.name for run in self.runs}
        kept = {name for name in records if name in planned or (self.folder.path / name).exists()}
        return {name: {**found, "removed": name not in planned} for name, found in records.items() if name in kept}

    def _refusal(self, changes: Mapping[str, str]) -> UserError:
        """Return the error about runs that were started with another config. changes: name -> `find_change`."""
        (first, change), *others = changes.items()
        names = shorten(", ".join(name for name, _ in others), _NAMES)
        more = f", and {len(others)} more with another config ({names})" if others else ""
        removed = "these folders to run them again" if others else "that folder to run it again"
        return UserError(
            f"{self.option}: {self.folder.path / first} was started with {change}{more}; choose another {self.option}, "
            f"or remove {removed}"
        )


def check_unchanged(configs: Mapping[str, bytes]) -> None:
    """Raise UserError if a config file has another content than it had before it was checked."""
    for file, content in configs.items():
        if read_config_file(file) != content:
            raise UserError(f"{file} was changed while it was checked; run the same command again")


def write_copy(file: str, content: bytes, folder: Path) -> Path:
    """Write the content of a config file to `folder`, and return the path. It has the same name: tasks are called like
    their files."""
    copy = folder / Path(file).name
    write_file(copy, content)
    return copy


def _has_failed(run: PlannedRun, records: Mapping[str, RunRecord]) -> bool:
    """Return whether a run failed when it was last run, or its pretraining did, which comes before it."""
    names = (run.name, run.pretraining) if run.pretraining is not None else (run.name,)
    return any(records[name].get("state", DONE) != DONE for name in names)


def is_finished(run: PlannedRun, folder: RunFolder) -> bool:
    """Return whether a run is done, also if the command was killed before it could note that. The folder of a
    fine-tuning run that has more seeds now may still report the end of the run with fewer."""
    outcome = read_outcome(folder)
    return outcome is not None and outcome.outcome is Outcome.DONE and has_planned_seeds(run, folder)


def has_planned_seeds(run: PlannedRun, folder: RunFolder) -> bool:
    """Return whether the results of a fine-tuning run, or of a sweep of them, are of the seeds that it has now. True
    for a pretraining run, and if the results are missing or damaged, which is reported where they are read."""
    found = []
    with suppress(UserError, OSError):
        found += [config.get(SEEDS) for config in recorded_configs(folder.path / SWEEP_RECORD, "--output").values()]
    with suppress(OSError, ValueError, KeyError, TypeError):
        found.append(read_json(folder.results)["seeds"])
    return all(seeds == run.config.get(SEEDS) for seeds in found)


@contextmanager
def _locked(folder: RunFolder, option: str) -> Iterator[None]:
    """Lock the folder. Raises UserError that names its option."""
    with ExitStack() as lock:
        try:
            lock.enter_context(lock_run(open_run_folder(folder.path)))
        except UserError as error:
            raise UserError(str(error).replace("run.dir", option, 1)) from None
        yield
