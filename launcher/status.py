"""`deepcloze status`: one run as a list, several as a table."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiment.run_folder import RunFolder
from experiment.tracking.console import describe_duration
from launcher.messages import notify
from launcher.run_status import RunStatus, is_run, read_status

_UNKNOWN = "–"
_WIDTH = 5000  # limit of a table in a pipe or file: no line is cut off


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
