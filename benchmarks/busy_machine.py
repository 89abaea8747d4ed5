"""Speed of a command beside other busy processes, with settings of its threads.

    python -m benchmarks.busy_machine "deepcloze finetune --config task.yaml --run.dir={folder}" \\
        [--beside 0,1,2] [--settings "OMP_NUM_THREADS=1;GOMP_SPINCOUNT=2000"] [--rounds 3]

`{folder}` stands for a new folder. The command is timed from start to end, with the environment as it is and with each
of the settings, in turn; it should take much longer than its imports. Each busy process is an endless loop in Python.
Prints medians in seconds, and the speed compared with the idle machine and the environment as it is.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fire
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import describe_machine

_AS_IT_IS = "as it is"


def busy_machine(command: str, *, beside: str = "0,1,2", settings: str = "", rounds: int = 3) -> None:
    """Measure all and print a table. beside: numbers of busy processes. settings: variables, separated by spaces; those
    of several settings by semicolons."""
    numbers = [int(number) for number in str(beside).strip("()").split(",")]
    environments = {_AS_IT_IS: dict[str, str]()}
    for text in filter(None, map(str.strip, settings.split(";"))):
        environments[text] = dict(variable.split("=", 1) for variable in text.split())
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for number in numbers:
            for name, variables in environments.items():
                with _busy_processes(number):
                    seconds.setdefault((name, number), []).append(_run(command, variables))
    medians = {case: statistics.median(found) for case, found in seconds.items()}
    table = Table(title=command, caption=describe_machine())
    table.add_column("setting")
    for number in numbers:
        table.add_column(f"beside {number}", justify="right")
    for name in environments:
        cells = [f"{medians[name, n]:.1f} s, {medians[_AS_IT_IS, numbers[0]] / medians[name, n]:.0%}" for n in numbers]
        table.add_row(name, *cells)
    Console().print(table)


@contextmanager
def _busy_processes(number: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _run(command: str, variables: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("{folder}", f"{folder}/run") for word in shlex.split(command)]
        start = time.perf_counter()
        subprocess.run(words, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    fire.Fire(busy_machine)
