"""Seconds until a page of `deepcloze report --follow` shows its runs, and what it costs to keep it current.

    python -m benchmarks.followed_report [--runs 50] [--events 2000] [--rounds 5] [--follow 20]

Makes up runs of this many log events each. In each round a new server is started, headless Chromium opens its page, and
the page is followed for some seconds, in which one of the runs logs. Seconds are from the request to the first picture,
and to the last curve; of the server's processor they are up to the last curve, and for each update after it. Needs
selenium and Debian's chromium-driver.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fire
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from selenium import webdriver

from benchmarks.measuring import describe_machine, spread
from experiment.run_files.run_folder import RunFolder, open_run_folder

_EVENTS_BETWEEN_EVALUATIONS = 100
_PAINTED = "return performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"
_COMPLETE = (
    "return document.querySelectorAll('.live').length && !/read$/.test(document.querySelector('.live').textContent)"
)
_NOW = "return performance.now()"
_UPDATES = "return performance.getEntriesByType('resource').length"


def measure(runs: int = 50, events: int = 2000, rounds: int = 5, follow: float = 20.0) -> None:
    """Print a table of medians (minimum – maximum)."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            write_run(Path(folder) / f"run-{number:03}", events, seed=number)
        measured = [_round(Path(folder), events, follow) for _ in range(rounds)]
    table = Table("", *(["median (min – max)"] if rounds > 1 else ["value"]))
    for name in measured[0]:
        table.add_row(name, spread([values[name] for values in measured], ".3g"))
    print(describe_machine(), f"{runs} runs, {events:,} log events each", sep="\n")
    Console().print(table)


def write_run(path: Path, events: int, seed: int) -> RunFolder:
    """Return a run that has ended."""
    folder, draw = open_run_folder(path), np.random.default_rng(seed).normal(0.0, 0.05, (events, 2))
    with folder.metrics.open("w", encoding="utf-8") as file:
        for number, (first, second) in enumerate(draw.tolist(), start=1):
            file.write(json.dumps(_event(10 * number, first, second)) + "\n")
            if number % _EVENTS_BETWEEN_EVALUATIONS == 0:
                scores = {"eval/wiki/loss": 2.5 + first, "eval/wiki/perplexity": 12.0, "eval/wiki/accuracy": 0.5}
                file.write(json.dumps({"step": 10 * number, **scores}) + "\n")
    return folder


def _event(step: int, first: float, second: float) -> dict[str, Any]:
    """Return an event with the keys of a pretraining run on one rank."""
    known = {"step": step, "tokens": 32_768 * step, "loss": 2.0 + 90.0 / (step + 9) + first, "lr": 1.0 / step}
    counts = {"loss_scale": None, "skipped_steps": 0, "overflows": 0, "checkpoint_seconds": 0.0, "memory": 2**34}
    speeds = {"tokens_per_second": 400_000 * (1 + second), "mfu": None, "data_wait": abs(second), "goodput": 0.9}
    return {**known, "grad_norm": 1.0 + abs(first), **counts, **speeds}


def _round(folder: Path, events: int, follow: float) -> dict[str, float]:
    command = [sys.executable, "-m", "launcher", "report", str(folder), "--follow", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, _browser() as driver:
        assert server.stdout is not None
        url, process = server.stdout.readline().split()[0], psutil.Process(server.pid)
        started = _cpu_seconds(process)
        driver.get(url)
        while not driver.execute_script(_COMPLETE):
            time.sleep(0.02)
        complete, painted = driver.execute_script(_NOW) / 1000, driver.execute_script(_PAINTED)[0] / 1000
        read, updates = _cpu_seconds(process), driver.execute_script(_UPDATES)
        run = next(path for path in sorted(folder.iterdir()))
        for number in range(round(follow)):
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_event(10 * (events + 1 + number), 0.0, 0.0)) + "\n")
            time.sleep(1.0)
        updates = max(driver.execute_script(_UPDATES) - updates, 1)
        values = {
            "seconds to the first picture": painted,
            "seconds to the last curve": complete,
            "seconds of the server's processor until then": read - started,
            "milliseconds of it for each update": 1000 * (_cpu_seconds(process) - read) / updates,
            "megabytes of the server": process.memory_info().rss / 1e6,
        }
        server.terminate()
    return values


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def _browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver")) as driver:
        yield driver


if __name__ == "__main__":
    fire.Fire(measure)
