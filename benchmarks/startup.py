"""Seconds from `deepcloze pretrain` to the first step of a small run, and to its end, by phase; and its peak memory.

    python -m benchmarks.startup [--rounds 5]

Builds a small corpus, then starts runs of three steps with one rank and with two, in turn. The files are in the
system's cache after the first, untimed run. Peak memory is summed over all processes, shared pages counted once.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import fire
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import PeakMemory, describe_machine, spread, write_small_run
from experiment.run_files.outcome_file import read_rank_record
from experiment.run_files.run_folder import RunFolder

_POLL_SECONDS = 0.005
_PHASES = (
    "launcher",
    "DeepSpeed starts ranks",
    "ranks import, launcher checks",
    "ranks prepare",
    "first step",
    "rest of the run",
)


class Measured(NamedTuple):
    seconds: list[float]  # by phase
    memory: int  # peak bytes of all processes


def startup(rounds: int = 5) -> None:
    """Measure and print a table.

    Args:
        rounds: runs with each number of ranks
    """
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="deepcloze-startup-") as folder:
        config = write_small_run(Path(folder))
        _seconds_by_phase(config, 1, Path(folder) / "first")
        measured: dict[int, list[Measured]] = {1: [], 2: []}
        for number in range(rounds):
            for ranks, runs in measured.items():
                with PeakMemory(seconds=0.5) as memory:
                    seconds = _seconds_by_phase(config, ranks, Path(folder) / f"run-{ranks}-{number}")
                runs.append(Measured(seconds, memory.bytes))
    Console().print(_table(measured))


def _seconds_by_phase(config: Path, ranks: int, run: Path) -> list[float]:
    folder = RunFolder(run)
    command = [sys.executable, "-m", "launcher", "pretrain", "--config", str(config), f"--num_gpus={ranks}"]
    times = [time.monotonic()]
    process = subprocess.Popen([*command, f"--run.dir={run}", "--oversubscribe"], stdout=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    phases: tuple[Callable[[], object], ...] = (
        lambda: _runs(tree, "deepspeed.launcher.launch"),
        lambda: _runs(tree, "pretrain.run"),
        lambda: folder.rank_record(0).exists(),
        lambda: (record := read_rank_record(folder, 0)) is not None and record.training,
        lambda: folder.metrics.exists() and '"step": 1,' in folder.metrics.read_text(),
    )
    for has_ended in phases:
        _wait_until(has_ended, process)
        times.append(time.monotonic())
    if process.wait() != 0:
        sys.exit(f"the run failed: {command}")
    times.append(time.monotonic())
    return [end - start for start, end in pairwise(times)]


def _wait_until(has_ended: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    while not has_ended():
        if process.poll() is not None:
            sys.exit(f"the run ended too early, with exit code {process.returncode}")
        time.sleep(_POLL_SECONDS)


def _runs(tree: psutil.Process, module: str) -> bool:
    """Return whether a process below `tree` runs `module`."""
    for process in tree.children(recursive=True):
        with suppress(psutil.Error):
            if module in process.cmdline():
                return True
    return False


def _table(measured: dict[int, list[Measured]]) -> Table:
    table = Table("seconds, median (min – max)", *(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in measured))
    columns = [[run.seconds for run in runs] for runs in measured.values()]
    rows = {phase: [[run[number] for run in runs] for runs in columns] for number, phase in enumerate(_PHASES)}
    rows["to the first step"] = [[sum(run[:-1]) for run in runs] for runs in columns]
    rows["to the end"] = [[sum(run) for run in runs] for runs in columns]
    rows["peak memory, GB"] = [[run.memory / 1e9 for run in runs] for runs in measured.values()]
    for name, cells in rows.items():
        table.add_row(name, *(spread(values, ".2f") for values in cells))
    return table


if __name__ == "__main__":
    fire.Fire(startup)
