"""`deepcloze status`: how runs are doing, from the files in their folders alone.

It may run on another machine, or be a copy that is not complete.
"""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from rich.table import Table

from experiment.config import read_recorded
from experiment.errors import UserError, describe_disk_error, escape_controls, notify
from experiment.files import read_json
from experiment.formatting import FILE_WIDTH, UNKNOWN, describe_duration, shorten, show, table_console
from experiment.results.main_score import main_score
from experiment.run_files.checkpoints import checkpoint_step
from experiment.run_files.goodput import AttemptTime, add_up, last_lines, reached_checkpoints, read_attempt_times
from experiment.run_files.metrics_file import last_number, read_last_events
from experiment.run_files.provenance import read_provenance
from experiment.run_files.run_folder import RunFolder, is_run, open_folder, runs_in
from experiment.run_files.run_life import READERS, State, read_life
from experiment.tracking.progress_line import TimedStep, estimate_left
from launcher.supervision.launch_result import count_attempts

T = TypeVar("T")

_LEAST_IMPORTANT = ("attempts", "goodput", "bad batches", "tokens/s", "last checkpoint", "loss", "time left", "seeds")


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. None: not known."""

    run: str
    state: State
    finished_seeds: int | None  # of a fine-tuning run
    seeds: int | None
    score: float | None  # mean of the seeds: of a finished fine-tuning run
    metric: str | None
    split: str | None  # that the score is of: test, or validation without one
    host: str | None
    message: str  # why it ended, or why its state is not known
    activity: str | None  # of a run that is alive
    step: int | None  # finished steps
    total_steps: int | None
    loss: float | None  # mean of the seeds that are trained at a time
    tokens_per_second: float | None  # their sum
    seconds_left: float | None
    checkpoint_step: int | None  # of the last checkpoint
    checkpoint_age: float | None  # seconds
    bad_batches: int
    goodput: float | None  # share of the time so far
    attempts: int  # launches, and restarts by the launcher; in fine-tuning, commands that have begun to train


def read_status(run: str) -> RunStatus:
    """Return the status of a run, which may not have started. Raises OSError if its files cannot be read."""
    folder = RunFolder(Path(run).absolute())
    logged = [folder.metrics, *folder.logs.glob("seed-*.jsonl")]  # the others: of seeds that are trained at a time
    events, *others = map(read_last_events, logged)
    config, times = read_recorded(folder.config), read_attempt_times(folder)
    seeds = _value(config, "training", "seeds", list)
    checkpoints = reached_checkpoints(folder, times)
    saved = checkpoint_step(checkpoints[-1]) if checkpoints else None
    # Scores of `deepcloze watch` come later, and a checkpoint may be newer than the last event.
    steps = [max(event["step"] for event in found) for found in (events, *others) if found]
    step = max(([sum(steps)] if steps else []) + ([] if saved is None else [saved]), default=None)
    if seeds is not None:
        times = _times_of_commands(folder, step, logged)
    attempts = last_lines(times)
    life = read_life(folder)
    total = attempts[-1].total_steps if attempts else _value(config, "schedule", "steps", int)
    recent = [line for line in times if line.start == times[-1].start]
    metric, split, score = _score(folder)
    # The file of a finished seed stays until those before it have finished; that of a seed that an earlier command has
    # trained, until it is trained again.
    began = recent[0].time if recent else 0.0
    training = [
        found
        for path, found in zip(logged[1:], others, strict=True)
        if found and found[-1].get("seed") not in folder.finished_seeds and _last_change(path) >= began
    ] or [events]
    losses, speeds = (
        [number for found in training if (number := last_number(found, key)) is not None]
        for key in ("loss", "tokens_per_second")
    )
    return RunStatus(
        run=run,
        state=life.state,
        host=life.host,
        message=life.message,
        finished_seeds=len(folder.finished_seeds.keys() & set(seeds)) if seeds else None,
        seeds=len(seeds) if seeds else None,
        score=score,
        metric=metric,
        split=split,
        activity=attempts[-1].activity if attempts and seeds is None and life.state == "running" else None,
        step=step,
        total_steps=total,
        loss=fmean(losses) if losses else None,
        tokens_per_second=sum(speeds) if speeds else None,
        seconds_left=_seconds_left(recent, total) if life.state == "running" else None,
        checkpoint_step=saved,
        checkpoint_age=_age(checkpoints[-1]) if checkpoints else None,
        bad_batches=len(list(folder.bad_batch(0).parent.glob("step-*"))),
        goodput=add_up(attempts).share if attempts and seeds is None else None,
        attempts=max(count_attempts(folder), len(attempts)),
    )


def find_run(run: str) -> RunFolder:
    """Find a run. Raises UserError if there is none."""
    folder = open_folder(run)
    if is_run(folder):
        return folder
    if runs := runs_in(run):
        raise UserError(f"{folder.path} is a folder of runs: give one of {shorten(', '.join(map(str, runs)), 300)}")
    known = (folder.config, folder.metrics, folder.launches, folder.lock)
    names = ", ".join(str(path.relative_to(folder.path)) for path in known)
    raise UserError(f"{folder.path} is not a run folder: expected one of {names}, found none")


def _value(config: Mapping[str, Any], section: str, key: str, kind: type[T]) -> T | None:
    """Return the value of a key in a config that may be incomplete; None if there is none of that kind."""
    values = config.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, kind) else None


def _times_of_commands(folder: RunFolder, step: int | None, logged: Sequence[Path]) -> list[AttemptTime]:
    """Return the attempts at a fine-tuning run, without activities: the start of each, and the last event of the last
    one. Empty if provenance.json cannot be read, as in an incomplete copy. logged: the files of the events."""
    lines = []
    with suppress(OSError, UserError, LookupError, TypeError, ValueError):
        for number, command in enumerate((read_provenance(folder) or {"attempts": []})["attempts"]):
            start = datetime.fromisoformat(command["date"]).timestamp()
            first, total = command.get("step", 0), command.get("total_steps")  # version 0.2.0 did not record them
            lines.append(AttemptTime(number, start, first, first, total, "", {}))  # starts may be equal
        if lines and step is not None:
            last = max(map(_last_change, logged))
            lines.append(replace(lines[-1], time=last, step=step))
    return lines


def _score(folder: RunFolder) -> tuple[str | None, str | None, float | None]:
    """Return the metric of a fine-tuning run, and the split and the mean of its main score."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        results = read_json(folder.results)
        if (found := main_score(results)) is not None:
            split, mean, _ = found
            return results["metric"], split, float(mean)
    return None, None, None


def _seconds_left(lines: Sequence[AttemptTime], total: int | None) -> float | None:
    """Return the seconds left of the time budget, or as estimated. `lines`: of the last attempt."""
    if lines and (end := lines[-1].end) is not None:
        return max(0.0, end - lines[-1].time)
    return estimate_left([TimedStep(line.time, line.step, line.paused) for line in lines], total)


def _last_change(path: Path) -> float:
    """Return when a file was last changed, as time.time(); 0 if it does not exist."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _age(checkpoint: Path) -> float | None:
    with suppress(OSError):  # deleted meanwhile
        return max(0.0, time.time() - checkpoint.stat().st_mtime)
    return None


def print_status(folders: Sequence[str], as_json: bool) -> None:
    """Print the status of runs. Raises UserError if a folder does not exist, or if there is no run."""
    runs = {folder: runs_in(folder) for folder in folders}
    if not any(runs.values()):
        raise UserError(f"{folders[0]} is not a run folder and contains none")
    for folder in folders:
        if not runs[folder]:
            notify(f"{folder} is skipped: it is not a run folder and contains none")
    each: dict[Path, Path] = {}
    for run in chain.from_iterable(runs.values()):
        each.setdefault(run.resolve(), run)

    def read(run: Path) -> RunStatus | None:
        try:
            return read_status(str(run))
        except OSError as error:
            if len(each) == 1:
                raise
            notify(f"{run} is skipped: {describe_disk_error(error) or error}")
            return None

    with ThreadPoolExecutor(READERS) as readers:
        found = [status for status in readers.map(read, each.values()) if status is not None]
    if as_json:
        print(json.dumps([asdict(status) for status in found]))
    elif len(found) == 1:
        print(escape_controls(_list(found[0])))
    else:
        _print_table(found)


def _list(status: RunStatus) -> str:
    values = {"state": _state(status), **_values(status)}
    width = max(map(len, values))
    lines = [status.run, *(f"  {name.ljust(width)}  {value}" for name, value in values.items())]
    return "\n".join([*lines, *(f"  {line}" for line in status.message.splitlines())])


def _print_table(found: Sequence[RunStatus]) -> None:
    """Print a table without the columns that do not fit the terminal."""
    console = table_console()
    names = list(dict.fromkeys(name for status in found for name in _values(status)))
    left_out: list[str] = []
    unlimited = console.options.update(max_width=FILE_WIDTH)
    for name in _LEAST_IMPORTANT:
        if console.measure(_table(found, names), options=unlimited).maximum <= console.width:
            break
        if name in names:
            names.remove(name)
            left_out.append(name)
    console.print(_table(found, names))
    if left_out:
        console.print(f"left out to fit the terminal: {', '.join(left_out)} (deepcloze status RUN, or --json)")


def _table(found: Sequence[RunStatus], names: Sequence[str]) -> Table:
    table = Table("run", "state")
    for name in names:
        table.add_column(name, justify="right")
    for status in found:
        values = _values(status)
        table.add_row(escape_controls(status.run), _state(status), *(values.get(name, "") for name in names))
    return table


def _state(status: RunStatus) -> str:
    """Describe the state: 'running on node-1, evaluating'."""
    where = f" on {status.host}" if status.host else ""
    what = f", {status.activity}" if status.activity else ""
    return f"{status.state}{where}{what}"


def _values(status: RunStatus) -> dict[str, str]:
    training = {
        "step": show(status.step, ",") + ("" if status.total_steps is None else f" of {status.total_steps:,}"),
        "loss": show(status.loss, ".4f"),
        "tokens/s": show(status.tokens_per_second, ",.0f"),
        "time left": describe_duration(status.seconds_left),
    }
    attempts = f"{status.attempts:,}"
    if status.seeds is not None:
        score = UNKNOWN if status.score is None else f"{status.metric} {status.score:.4f} on {status.split}"
        seeds = f"{status.finished_seeds} of {status.seeds}"
        return {"seeds": seeds, "score": score, **training, "attempts": attempts}
    age = "" if status.checkpoint_age is None else f", {describe_duration(status.checkpoint_age)} ago"
    return {
        **training,
        "last checkpoint": UNKNOWN if status.checkpoint_step is None else f"{status.checkpoint_step:,}{age}",
        "bad batches": f"{status.bad_batches:,}",
        "goodput": show(status.goodput, ".1%"),
        "attempts": attempts,
    }
