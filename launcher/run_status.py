"""How a run is doing, from the files in its folder alone: it may run elsewhere, or be a copy that is not complete."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiment.checkpoints import checkpoint_step, complete_checkpoints
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from experiment.goodput import AttemptTime, add_up, last_lines, read_attempt_times
from experiment.run_folder import RunFolder
from experiment.run_life import State, read_life
from experiment.tracking.console import RATE_EVENTS
from experiment.tracking.jsonl import last_number, read_last_events
from launcher.supervision.launch_log import count_attempts


@dataclass(frozen=True)
class RunStatus:
    """How a run is doing. None: not known."""

    run: str
    state: State
    host: str | None
    message: str  # why it ended, or why its state is not known
    activity: str | None  # of a run that is alive
    step: int | None  # finished steps
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint_step: int | None  # of the last checkpoint
    checkpoint_age: float | None  # seconds
    bad_batches: int
    goodput: float | None  # share of the time so far
    restarts: int


def read_status(run: str) -> RunStatus:
    """Raises UserError if there is no such run, OSError if its files cannot be read."""
    folder = find_run(run)
    events, times = read_last_events(folder.metrics), read_attempt_times(folder)
    attempts, checkpoints = last_lines(times), complete_checkpoints(folder.checkpoints)
    life = read_life(folder)
    total = _total_steps(folder, attempts)
    recent = [line for line in times if line.start == times[-1].start]
    return RunStatus(
        run=run,
        state=life.state,
        host=life.host,
        message=life.message,
        activity=attempts[-1].activity if attempts and life.state == "running" else None,
        step=max((event["step"] for event in events), default=None),  # scores of `deepcloze watch` come later
        total_steps=total,
        loss=last_number(events, "loss"),
        tokens_per_second=last_number(events, "tokens_per_second"),
        seconds_left=_seconds_left(recent, total) if life.state == "running" else None,
        checkpoint_step=checkpoint_step(checkpoints[-1]) if checkpoints else None,
        checkpoint_age=_age(checkpoints[-1]) if checkpoints else None,
        bad_batches=len(list(folder.bad_batch(0).parent.glob("step-*"))),
        goodput=add_up(attempts).share if attempts else None,
        restarts=max(0, max(count_attempts(folder), len(attempts)) - 1),
    )


def is_run(folder: RunFolder) -> bool:
    """Whether the folder has something that only a run has."""
    known = (folder.config, folder.metrics, folder.launches)
    return folder.logs.is_dir() or any(path.exists() for path in known)


def find_run(run: str) -> RunFolder:
    """Raises UserError if there is no such run."""
    folder = RunFolder(Path(run).absolute())
    if not folder.path.is_dir():
        raise UserError(f"there is no run folder {folder.path}")
    if not is_run(folder):
        names = ", ".join(path.name for path in (folder.config, folder.metrics, folder.launches))
        raise UserError(f"{folder.path} is not a run folder: expected {names} or {folder.logs.name}/, found none")
    return folder


def _total_steps(folder: RunFolder, attempts: Sequence[AttemptTime]) -> int | None:
    """As the last attempt knows it; before its first line, as the config says."""
    if attempts:
        return attempts[-1].total_steps
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError, KeyError, TypeError):
        steps = read_yaml(folder.config.read_text(encoding="utf-8"))["schedule"]["steps"]
        return steps if isinstance(steps, int) else None
    return None


def _seconds_left(lines: Sequence[AttemptTime], total: int | None) -> float | None:
    """At the speed of the last log events, evaluations and checkpoints included. `lines`: of the last attempt."""
    by_step = {line.step: line.time for line in lines}  # the last one of each step
    steps = list(by_step)[-RATE_EVENTS:]
    if total is None or len(steps) < 2 or steps[-1] <= steps[0]:
        return None
    first, last = steps[0], steps[-1]
    return max(0, total - last) * (by_step[last] - by_step[first]) / (last - first)


def _age(checkpoint: Path) -> float | None:
    with suppress(OSError):  # deleted meanwhile
        return max(0.0, time.time() - checkpoint.stat().st_mtime)
    return None
