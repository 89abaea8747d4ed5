"""Shared by all benchmarks: start processes, watch their memory, and describe the machine and a series of values."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import fire
import psutil

from experiment.formatting import describe_duration
from experiment.process.hardware import has_native_bf16
from experiment.run_files.metrics_file import read_events
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from launcher.ranks.environment import GLIBC_TUNABLES

STOPPED = Outcome.STOPPED.exit_code
DEFAULT_ALLOCATOR: dict[str, str] = {}
OUR_ALLOCATOR = {"GLIBC_TUNABLES": GLIBC_TUNABLES}  # set by `deepcloze pretrain` for its ranks


def deepcloze(*arguments: str, threads: int | None = None) -> None:
    """Run a command of deepcloze; raises CalledProcessError if it fails. `threads`: per process."""
    command = [sys.executable, "-m", "launcher", *arguments]
    subprocess.run(command, env=_variables(threads), stdout=sys.stderr, check=True)


def run_module(
    module: str, settings: dict[str, Any], threads: int | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    """Return the JSON that `python -m module SETTINGS` prints last; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", module, json.dumps(settings)]
    variables = _variables(threads, environment)
    finished = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def run_or_measure(command: Callable[..., None], measure: Callable[..., Any]) -> None:
    """Call `command` with the arguments of this process or, if `run_module` has started it, print what `measure`
    returns."""
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
    else:
        fire.Fire(command)


def _variables(threads: int | None, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **(environment or {})}


def cpu_precision() -> str:
    """Return bf16, or fp32 where this CPU only emulates bf16."""
    return "bf16" if has_native_bf16("cpu") else "fp32"


class PeakMemory:
    """The peak memory, in `bytes`, of all processes that are started in a `with` block, their children included.

    Sampled every `seconds`, which takes a core some milliseconds per GB. Shared pages count once (PSS).
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.bytes = 0
        self._seconds = seconds
        self._before = _started()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def sample(self) -> None:
        """Measure now: processes that fork or end meanwhile may count their pages twice."""
        memory = sum(map(_memory, _started() - self._before))
        self.bytes = max(self.bytes, memory)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.sample()


def _started() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has ended
        return int(process.memory_full_info().pss)
    return 0


def describe_machine() -> str:
    """One line to publish with a result: date, CPU, memory, and versions of Python and the libraries."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    hardware = f"{_cpu()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return f"{date.today()}, {hardware}, Python {platform.python_version()}, {versions}"


def _cpu() -> str:
    """Return the name, with family and model where /proc/cpuinfo has them: virtual machines may give CPUs of all
    generations one name, and the latest may be twice as fast."""
    first_core = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first_core.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def spread(values: Sequence[float], form: str) -> str:
    """Median, minimum and maximum, each formatted by `form`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def stop_after(
    seconds: float, command: Sequence[str], run: RunFolder, environ: Mapping[str, str] | None = None
) -> bool:
    """Start a run, and send it SIGTERM this long after it has logged its first step, as a job queue or a user would.
    Return whether it was stopped; if not, it has finished before. Raises SystemExit if it fails."""
    with subprocess.Popen(command, env=environ) as process:
        try:
            while process.poll() is None and not any("loss" in event for event in read_events(run.metrics)):
                time.sleep(0.2)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                message = f"{describe_duration(seconds)} of training are over: sending SIGTERM"
                print(message, file=sys.stderr, flush=True)
                process.send_signal(signal.SIGTERM)
            if (code := process.wait()) not in (0, STOPPED):
                raise SystemExit(f"expected exit code {STOPPED} of the run, got {code}")
            return code == STOPPED
        finally:
            process.kill()
