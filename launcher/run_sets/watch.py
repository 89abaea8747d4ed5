"""`deepcloze watch`: score each new complete checkpoint of a pretraining run once, oldest first.

`RUN/downstream/TASK/step-XXXXXXXX.json` is the record that a checkpoint is scored. The events go to metrics.jsonl and
Weights & Biases through the process that writes them: rank 0 while the run is running, this one when it has ended.
"""

import errno
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiment.config import load_config
from experiment.errors import DENIED, UserError, describe_disk_error, inform, is_damage, notify, stopped_by_disk_errors
from experiment.process.signals import handle_stop_signals, interrupt
from experiment.progress import quiet
from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints, weights_digest
from experiment.run_files.downstream import (
    DownstreamLog,
    DownstreamResult,
    best_result,
    read_results,
    result_file,
    write_result,
)
from experiment.run_files.goodput import reached_checkpoints, read_attempt_times
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.provenance import read_provenance, wandb_id
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_life import read_life
from experiment.run_files.run_lock import lock_run
from experiment.tracking.config import AlertsConfig
from experiment.tracking.notification import Message, Service, mail_service
from experiment.tracking.tracker import TrackedRun, open_trackers
from launcher.options import WatchOptions
from launcher.run_sets.watched_task import (
    ScoringError,
    TaskRejectedError,
    WatchedTask,
    read_watched_task,
    score_checkpoint,
)
from pretrain.config import PretrainConfig

_POLL_SECONDS = 3.0
_ATTEMPTS = 2  # at scoring a checkpoint
_ENDED = ("stopped", "refused", "failed")  # before its last step; a run that was killed may train on

Score = Callable[[Path, str, WatchedTask, RunFolder], DownstreamResult]


def watch_run(options: WatchOptions) -> None:
    """Score the checkpoints of a run until it is done.

    Raises UserError, StoppedError if a signal or a full disk stops it, KeyboardInterrupt for a signal while nothing is
    scored, and SystemExit if checkpoints could not be scored.
    """
    with handle_stop_signals(interrupt):
        run = RunFolder(Path(options.run).absolute())
        read_run_config(run)  # rejects other folders
        mail = None if options.mail is None else (mail_service(options.mail), options.mail)
        task = read_watched_task(options.task, options.probe)
        folder = open_run_folder(run.downstream / task.name)
        with lock_run(folder), stopped_by_disk_errors("watch: "):
            failed = Watch(run, task, Announcement(options.on_result, mail)).finish()
            print(describe_scores(run, task))
    if failed:
        sys.exit(f"deepcloze: watch: {task.name}: could not score step {', '.join(map(str, failed))}")


def read_run_config(run: RunFolder) -> PretrainConfig:
    """Read the config of a run. Raises UserError if the folder is not a pretraining run, or is not complete."""
    if not run.config.is_file():
        raise UserError(f"{run.path} is not a pretraining run that has started: it has no {run.config.name}")
    if next(run.path.glob("seed-*"), None) is not None:
        raise UserError(f"{run.path} is a run of `deepcloze finetune`; expected one of `deepcloze pretrain`")
    if read_provenance(run) is None:  # rank 0 writes it first
        raise UserError(f"{run.path} has no {run.provenance.name}: it may be a copy that is not complete")
    return load_config(PretrainConfig, run.config)


def describe_scores(run: RunFolder, task: WatchedTask) -> str:
    """Return a line on the scores of all checkpoints on a task."""
    if not (results := _results_on(task, run)):
        return f"{task.name}: no checkpoint is scored"
    named = {"best": best_result(results), "last": results[-1]}
    scores = ", ".join(f"{name} {result} at step {result.step:,}" for name, result in named.items())
    return (
        f"{task.name}: {task.metric} on validation: {scores}; scored checkpoints: {len(results):,}; "
        f"see deepcloze report {shlex.quote(str(run.path))}"
    )


@dataclass(frozen=True)
class Announcement:
    """Destinations of the result of a checkpoint: a command of the user, mail. Failures are warnings."""

    command: str | None = None  # of the shell, gets the result as JSON on stdin
    mail: tuple[Service, str] | None = None  # and the address

    def send(self, run: RunFolder, result: DownstreamResult) -> None:
        """Send a result. Waits for the command."""
        text = json.dumps({"run": str(run.path), **asdict(result)}, ensure_ascii=False, indent=2) + "\n"
        if self.command is not None:
            code = subprocess.run(self.command, shell=True, input=text.encode(), check=False).returncode
            if code != 0:
                notify(f"watch: warning: --on_result failed with exit code {code}: {self.command}")
        if self.mail is not None:
            service, to = self.mail
            subject = f"{run.path.name}: {result.task} {result.metric} {result.value:.4f} at step {result.step}"
            try:
                service.send(Message(subject, text))
            except (OSError, ValueError) as error:
                # smtplib raises ValueErrors that show parts of the password.
                reason = error if isinstance(error, OSError) else type(error).__name__
                notify(f"watch: warning: cannot send mail to {to}: {reason}")


class Watch:
    """Scores the checkpoints of a run on a task. Raises UserError if they were scored with another config before."""

    def __init__(
        self,
        run: RunFolder,
        task: WatchedTask,
        announcement: Announcement,
        score: Score = score_checkpoint,
        wait: Callable[[], None] = lambda: time.sleep(_POLL_SECONDS),
    ) -> None:
        """score: as `score_checkpoint`. wait: until it is time to look again."""
        self._run = run
        self._config = read_run_config(run)
        self._task = task
        self._announcement = announcement
        self._score = score
        self._wait = wait
        self._scored = _read_scored(run, task)  # step -> weights
        self._failures: dict[tuple[int, str], list[int]] = {}  # (step, weights) -> newest step at each failure
        self._waiting: set[int] = set()  # steps that were seen and are not scored
        self._all_logged = False
        self._awaited = ""  # the last message about waiting
        self._described = False  # the data and the training, by the process that has scored a checkpoint

    def finish(self) -> list[int]:
        """Return when the run is done and its checkpoints are scored: returns the steps of the others. Raises UserError
        if its folder is gone."""
        while True:
            try:
                if self._look():
                    return sorted({step for step, _ in self._failures})
            except OSError as error:
                if is_damage(error) or error.errno in {*DENIED, errno.ENOSPC, errno.EDQUOT}:
                    raise
                self._announce_once(f"until the disk answers: {describe_disk_error(error) or error}")
                self._wait()

    def _look(self) -> bool:
        """Try to score the oldest checkpoint that is due, or wait. Returns whether the run is done, and nothing is left
        to do. Raises OSError."""
        state = read_life(self._run).state  # before looking: a run that is done saves no more
        due = self._next_checkpoint(state == "done")
        if due is None:
            self._check_folder()
        else:
            self._try(*due)
        logged = self._log_results(state)
        is_finished = due is None and state == "done" and logged
        if due is None and not is_finished:
            self._announce_wait(state)
            self._wait()
        return is_finished

    def _check_folder(self) -> None:
        if not self._run.path.is_dir():
            raise UserError(f"the run folder {self._run.path} is gone")

    def _announce_wait(self, state: str) -> None:
        """Print the event that the watch waits for. state: of the run."""
        if state in _ENDED:
            self._announce_once(f"until {self._run.path} is resumed: it has ended before its last step")
        elif state != "done":
            self._announce_once("for checkpoints")

    def _announce_once(self, awaited: str) -> None:
        """Print what the watch waits for, once until it changes."""
        if awaited != self._awaited:
            self._awaited = awaited
            inform(f"watch: {self._task.name}: waiting {awaited}")

    def _next_checkpoint(self, done: bool) -> tuple[Path, str, int] | None:
        """Return the oldest checkpoint that is due, its weights, and the newest step."""
        found = {checkpoint_step(path): path for path in complete_checkpoints(self._run.checkpoints)}
        for step in sorted(self._waiting - found.keys()):
            notify(f"watch: {self._task.name}: step {step}: skipped: the checkpoint was deleted before it was scored")
        unscored = {}
        for path in reached_checkpoints(self._run, read_attempt_times(self._run)):
            step = checkpoint_step(path)
            try:
                weights = weights_digest(path)
            except OSError as error:
                if not is_damage(error):
                    raise
                continue  # just deleted
            except ValueError:
                weights = "damaged"  # so scoring it fails
            # The run deletes results when it resumes from an earlier step.
            if self._scored.get(step) != weights or not result_file(self._run, self._task.name, step).exists():
                unscored[step] = (path, weights)
        newest = max(found, default=-1)
        self._waiting = {step for step, (_, weights) in unscored.items() if (step, weights) not in self._failures}
        for step, (path, weights) in unscored.items():
            if self._is_due(step, weights, newest, done):
                return path, weights, newest
        return None

    def _is_due(self, step: int, weights: str, newest: int, done: bool) -> bool:
        """Return whether to score it: a failed one again when there is a newer one, or there will be none."""
        failures = self._failures.get((step, weights), [])
        return not failures or (len(failures) < _ATTEMPTS and (done or newest > failures[-1]))

    def _try(self, checkpoint: Path, weights: str, newest: int) -> None:
        step, name, attempts = checkpoint_step(checkpoint), self._task.name, self._attempts()
        inform(f"watch: {name}: step {step}: scoring")
        try:
            with quiet(warnings=False) if self._described else nullcontext():
                result = self._score(checkpoint, weights, self._task, self._run)
        except OSError:
            if checkpoint in complete_checkpoints(self._run.checkpoints):
                raise
            return  # it was deleted: `_next_checkpoint` says so
        except ScoringError as error:
            self._check_folder()
            if isinstance(error, TaskRejectedError) and not self._scored:
                raise UserError(f"{self._task.file}: no checkpoint can be scored on this task, see above") from None
            failures = self._failures.setdefault((step, weights), [])
            failures.append(newest)
            later = ", is tried once more later" if len(failures) < _ATTEMPTS else ""
            notify(f"watch: {name}: step {step}: cannot be scored{later}: {error}")
            return
        self._waiting.discard(step)
        write_result(self._run, result)
        if any(attempt.get("step", step) < step for attempt in self._attempts() if attempt not in attempts):
            # After it was written: the run may have looked for results to delete before.
            result_file(self._run, name, step).unlink(missing_ok=True)
            notify(f"watch: {name}: step {step}: dropped: the run has resumed from an earlier step")
            return
        self._scored[step], self._all_logged, self._described = weights, False, True
        self._failures = {key: failed for key, failed in self._failures.items() if key[0] != step}
        inform(f"watch: {name}: step {step}: {result.metric} {result} on validation, {result.seconds:,.0f} s")
        self._announcement.send(self._run, result)

    def _attempts(self) -> list[dict[str, Any]]:
        return list((read_provenance(self._run) or {"attempts": []})["attempts"])

    def _log_results(self, state: str) -> bool:
        """Add missing results to metrics.jsonl if the run has ended. Returns whether it has, and none is missing."""
        if not self._all_logged and state in {*_ENDED, "done"}:
            self._all_logged = not DownstreamLog(self._run).take_new(sys.maxsize) or self._log_missing()
        return self._all_logged

    def _log_missing(self) -> bool:
        """Log missing results. Returns whether this process could."""
        with ExitStack() as lock:
            try:
                lock.enter_context(lock_run(self._run))
            except UserError:  # a process uses the folder: the run has resumed
                return False
            try:
                self._config = load_config(PretrainConfig, self._run.config)  # of the last attempt
            except UserError as error:  # such as a key of a later version
                notify(f"watch: warning: {error}; the scores are logged as configured before")
            log_results(self._run, self._config)
        return True


def log_results(run: RunFolder, config: PretrainConfig) -> None:
    """Log the results that metrics.jsonl lacks. For the process that has locked the run folder."""
    provenance, outcome = read_provenance(run), read_outcome(run)
    assert provenance is not None, "see `read_run_config`"
    tracked = TrackedRun(
        wandb_id=wandb_id(provenance),
        parameters=config.model_dump(mode="json"),
        total_steps=None,
        resumed_step=sys.maxsize,  # drop nothing
    )
    tracking = config.tracking.model_copy(update={"alerts": AlertsConfig(), "artifacts": False})
    tracker = open_trackers(tracking, run, tracked, console=False)
    for event in DownstreamLog(run).take_new(sys.maxsize):
        tracker.log(event)
    tracker.close(outcome.outcome if outcome is not None else Outcome.FAILED)


def _results_on(task: WatchedTask, run: RunFolder) -> list[DownstreamResult]:
    """Read the results of a task, by step."""
    return [result for result in read_results(run) if result.task == task.name]


def _read_scored(run: RunFolder, task: WatchedTask) -> dict[int, str]:
    """Step -> weights. Raises UserError if one was scored with another config."""
    results = _results_on(task, run)
    if any(result.config != task.config for result in results):
        raise UserError(
            f"{task.file}: {run.downstream / task.name} has scores of another config, which cannot be compared; set "
            "task.name to another name, or remove that folder"
        )
    return {result.step: result.weights for result in results}
