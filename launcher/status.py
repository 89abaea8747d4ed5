"""`deepcloze status`: how a run is doing, from the files in its folder alone.

It may run on another machine, or be a copy that is not complete.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from experiment.checkpoints import checkpoint_step, complete_checkpoints
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError, notify
from experiment.formatting import describe_duration
from experiment.goodput import AttemptTime, add_up, last_lines, read_attempt_times
from experiment.run_folder import RunFolder
from experiment.run_life import State, read_life
from experiment.tracking.jsonl import last_number, read_last_events
from experiment.tracking.progress_line import RATE_EVENTS
from launcher.supervision.launch_result import count_attempts

_UNKNOWN = "–"
_WIDTH = 5000  # limit of a table in a pipe or file: no line is cut off


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
    """Whether the folder has something that only a run has. Sweeps and comparisons have logs and a record of runs."""
    known = (folder.config, folder.metrics, folder.launches)
    records = (folder.path / "sweep.json", folder.path / "runs.json")
    return any(path.exists() for path in known) or (folder.logs.is_dir() and not any(map(Path.exists, records)))


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


def print_status(runs: Sequence[str], as_json: bool) -> None:
    """Skips what is no run among several folders. Raises UserError if one does not exist, or if there is no run."""
    runs = _without_others(runs)
    with ThreadPoolExecutor() as readers:  # those on other machines take seconds
        found = list(readers.map(read_status, runs))
    if as_json:
        print(json.dumps([asdict(status) for status in found], ensure_ascii=False))
    elif len(found) == 1:
        print(_list(found[0]))
    else:
        _print_table(found)


def _without_others(folders: Sequence[str]) -> Sequence[str]:
    """The folders that are runs, or do not exist: `runs/*` also matches sweeps and reports."""
    found = [folder for folder in folders if is_run(RunFolder(Path(folder))) or not Path(folder).exists()]
    if not found:
        return folders[:1]
    for folder in folders:
        if folder not in found:
            notify(f"{folder} is skipped: it is not a run folder")
    return found


def _list(status: RunStatus) -> str:
    values = {"state": _state(status), **_values(status)}
    width = max(map(len, values))
    lines = [status.run, *(f"  {name.ljust(width)}  {value}" for name, value in values.items())]
    return "\n".join([*lines, *(f"  {line}" for line in status.message.splitlines())])


def _print_table(found: Sequence[RunStatus]) -> None:
    table = Table("run", "state")
    for name in _values(found[0]):
        table.add_column(name, justify="right")
    for status in found:
        table.add_row(status.run, _state(status), *_values(status).values())
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def _state(status: RunStatus) -> str:
    """'running on node-1, evaluating'"""
    where = f" on {status.host}" if status.host else ""
    what = f", {status.activity}" if status.activity else ""
    return f"{status.state}{where}{what}"


def _values(status: RunStatus) -> dict[str, str]:
    age = None if status.checkpoint_age is None else f", {describe_duration(status.checkpoint_age)} ago"
    return {
        "step": _format(status.step, ",") + ("" if status.total_steps is None else f" of {status.total_steps:,}"),
        "loss": _format(status.loss, ".4f"),
        "tokens/s": _format(status.tokens_per_second, ",.0f"),
        "time left": describe_duration(status.seconds_left),
        "last checkpoint": _UNKNOWN if status.checkpoint_step is None else f"{status.checkpoint_step:,}{age or ''}",
        "bad batches": f"{status.bad_batches:,}",
        "goodput": _format(status.goodput, ".1%"),
        "restarts": f"{status.restarts:,}",
    }


def _format(value: float | None, spec: str) -> str:
    return _UNKNOWN if value is None else format(value, spec)
