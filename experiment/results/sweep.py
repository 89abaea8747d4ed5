"""A grid of runs, carried out one after the other, and one table and one plot of what came of them.

Runs are command lines that each fill a run folder; how they do it is their own affair. What is read of them is
`results.json`, or `metrics.jsonl` and the outcome. OUTPUT/sweep.json remembers the config of every run, so that a sweep
that is started again passes over what is finished and does not mix it with something else.
"""

import csv
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from experiment.errors import StoppedError, UserError
from experiment.files import write_json, write_text
from experiment.run_folder import Outcome, RunFolder
from experiment.tracking.jsonl import read_events

Grid = Mapping[str, Sequence[str]]
"""Dotted config key -> the raw texts of its values."""

_PAIRS = {"[": "]", "{": "}"}
_UNSAFE = re.compile(r"[^\w.+-]+")  # in the name of a folder
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED_CODES = (Outcome.STOPPED.exit_code, 128 + signal.SIGINT)


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    name: str  # of its folder in OUTPUT
    values: Mapping[str, str]  # dotted config key -> raw text
    argv: Sequence[str]  # the command that carries it out, or goes on with it
    config: Mapping[str, Any]  # the whole of it, flat


@dataclass(frozen=True)
class Result:
    run: Run
    state: str  # done, or how it failed
    value: float | None  # of the metric; None where there is none


def parse_grid(text: str) -> dict[str, tuple[str, ...]]:
    """`optimizer.lr=1e-4,5e-4 schedule.epochs=1,2`: keys apart by spaces, values by commas, lists in brackets.

    Raises UserError.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for part in filter(None, _split(text, " \t\n")):
        key, equals, listed = part.partition("=")
        values = tuple(value.strip() for value in _split(listed, ","))
        if not (equals and key) or not all(values):
            raise UserError(f"--grid: expected SECTION.KEY=VALUE,VALUE,…, found '{part}'")
        if key == "run.dir":
            raise UserError("--grid: every run gets a run.dir of its own; name where they all go with --output")
        if key in grid:
            raise UserError(f"--grid: '{key}' is given twice")
        if len(set(values)) < len(values):
            raise UserError(f"--grid: '{key}' has a value twice: {listed}")
        grid[key] = values
    if not grid:
        raise UserError("--grid: expected SECTION.KEY=VALUE,VALUE,…, found nothing")
    return grid


def combinations(grid: Grid) -> dict[str, dict[str, str]]:
    """{readable name: {key: value}} of every point of the grid; the last key changes fastest."""
    labels = short_names(list(grid))
    points: dict[str, dict[str, str]] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(f"{labels[key]}={_UNSAFE.sub('-', value).strip('-')}" for key, value in point.items())
        unused = (f"{name}{suffix}" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
        points[next(candidate for candidate in unused if candidate not in points)] = point
    return points


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """What keys are called where space is short: their last part, where no other one has the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def sweep(runs: Sequence[Run], output: Path, metric: str) -> None:
    """Carry out what is not finished, then write OUTPUT/sweep.{json,csv,png} and print the table.

    Raises UserError where OUTPUT holds runs of other configs, StoppedError where a signal or a run's own STOP ends it
    early, and SystemExit where runs failed, after all others are through.
    """
    record = _open_record(runs, output, metric)
    results = []
    for number, run in enumerate(runs, start=1):
        folder, place = RunFolder(output / run.name), f"[{number}/{len(runs)}] {run.name}"
        state = "done"
        if _is_finished(folder):
            _say(f"{place}: finished before")
        else:
            _say(f"{place}: running")
            began = time.monotonic()
            code = _carry_out(run.argv)
            if code in _STOPPED_CODES:
                raise StoppedError(f"sweep: stopped at {place}; start it again to go on")
            state = "done" if code == 0 else f"failed (exit code {code})"
            _say(f"{place}: {state} after {time.monotonic() - began:,.0f} s")
        value = read_metric(folder, metric) if state == "done" else None
        results.append(Result(run, state, value))
        record["runs"][run.name] |= {"state": state, "value": value}
        write_json(output / "sweep.json", record)
    ranked = rank(results, metric)
    _write_results(ranked, output, metric)
    if failed := [result.run.name for result in ranked if result.state != "done"]:
        sys.exit(f"deepcloze: sweep: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def read_metric(folder: RunFolder, metric: str) -> float | None:
    """The metric of a finished run: on validation in results.json, or the last one in metrics.jsonl."""
    results = folder.path / "results.json"
    if results.is_file():
        scores = json.loads(results.read_text(encoding="utf-8"))["splits"]["validation"]
        return float(scores[metric]["mean"]) if metric in scores else None
    values = [event[metric] for event in read_events(folder.metrics) if event.get(metric) is not None]
    return float(values[-1]) if values else None


def rank(results: Sequence[Result], metric: str) -> list[Result]:
    """Best first: the lowest loss or perplexity, the highest of any other metric; those without a value last."""
    sign = 1.0 if metric.rpartition("/")[2] in ("loss", "perplexity") else -1.0
    return sorted(results, key=lambda result: math.inf if result.value is None else sign * result.value)


def _split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators outside of brackets and quotes. Raises UserError for an open bracket."""
    parts, closing = [""], ""
    for character in text:
        if closing and character == closing[-1]:
            closing = closing[:-1]
        elif character in _PAIRS and closing[-1:] not in ("'", '"'):
            closing += _PAIRS[character]
        elif character in "'\"" and closing[-1:] not in ("'", '"'):
            closing += character
        elif not closing and character in separators:
            parts.append("")
            continue
        parts[-1] += character
    if closing:
        raise UserError(f"--grid: '{closing[-1]}' is missing in '{parts[-1]}'")
    return parts


def _open_record(runs: Sequence[Run], output: Path, metric: str) -> dict[str, Any]:
    """The content of OUTPUT/sweep.json before anything is run. Raises UserError where it is another sweep's."""
    path, known = output / "sweep.json", {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output: cannot read {path}: {error}") from None
    for run in runs:
        before = known.get(run.name, {}).get("config", run.config)
        keys = sorted(key for key in {*before, *run.config} if before.get(key) != run.config.get(key))
        if keys:
            raise UserError(
                f"--output: {output / run.name} was begun with another {keys[0]}: {before.get(keys[0])!r}, now it is "
                f"{run.config.get(keys[0])!r}; name another --output"
            )
    new = {run.name: known.get(run.name, {"config": dict(run.config)}) | {"values": dict(run.values)} for run in runs}
    record = {"metric": metric, "runs": known | new}
    try:
        write_json(path, record)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None
    return record


def _is_finished(folder: RunFolder) -> bool:
    outcome = folder.read_outcome()
    return (folder.path / "results.json").is_file() or (outcome is not None and outcome[0] is Outcome.DONE)


def _carry_out(argv: Sequence[str]) -> int:
    """The exit code of a command, to which signals are passed on: what it makes of them decides. One that a signal
    ended counts as stopped if the signal was passed on."""
    process = subprocess.Popen(argv, start_new_session=True)  # where no Ctrl-C reaches it twice
    passed = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal passed
        passed = True
        process.send_signal(number)

    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome.STOPPED.exit_code if passed and code != 0 else code


def _write_results(ranked: Sequence[Result], output: Path, metric: str) -> None:
    keys = list(ranked[0].run.values)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*keys, metric, "state", "folder"])
    for result in ranked:
        writer.writerow([*result.run.values.values(), result.value, result.state, result.run.name])
    write_text(output / "sweep.csv", table.getvalue())
    _print_table(ranked, keys, metric)
    drawn = [result for result in ranked if result.value is not None]
    if drawn:
        _draw(drawn, keys, metric, output / "sweep.png")
    print(f"{output}/sweep.csv, sweep.json" + (", sweep.png" if drawn else ""))


def _print_table(ranked: Sequence[Result], keys: Sequence[str], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for key in keys:
        table.add_column(key, justify="right", overflow="fold")
    table.add_column(metric, justify="right")
    for result in ranked:
        shown = f"{result.value:.4f}" if result.value is not None else ("–" if result.state == "done" else result.state)
        table.add_row(*result.run.values.values(), shown)
    Console(highlight=False, markup=False).print(table)


def _draw(results: Sequence[Result], keys: Sequence[str], metric: str, path: Path) -> None:
    """The metric over the first key, a line for each combination of the others."""
    from experiment.results.figures import Line, Panel, draw_grid

    first, *others = keys
    labels = short_names(keys)
    texts = list(dict.fromkeys(result.run.values[first] for result in results))
    numbers = [_number(text) for text in texts]
    numeric = all(number is not None for number in numbers)
    where = {
        text: float(number if numeric and number is not None else index)
        for index, (text, number) in enumerate(zip(texts, numbers, strict=True))
    }
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        label = " ".join(f"{labels[key]}={result.run.values[key]}" for key in others)
        assert result.value is not None
        lines.setdefault(label, []).append((where[result.run.values[first]], result.value))
    panel = Panel(
        metric,
        [
            Line(label, [x for x, _ in sorted(points)], [y for _, y in sorted(points)], marked=True)
            for label, points in sorted(lines.items())
        ],
        scale="log" if _spans_decades([y for points in lines.values() for _, y in points]) else "linear",
    )
    draw_grid(path, panel, first, {where[text]: text for text in texts}, _spans_decades(list(where.values())))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= 10 * min(values)


def _say(message: str) -> None:
    print(f"deepcloze: sweep: {message}", file=sys.stderr, flush=True)
