"""Threads sleep instead of spinning while other processes use the cores."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from experiment.process.shared_cores import Spinning, ThreadTimes, waiting_share
from finetune.options import ServeOptions

needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")

CODE = """
import os, subprocess, sys, threading, time
import torch
from experiment.process.shared_cores import Spinning, load_openmp, share_cores

cores = len(os.sched_getaffinity(0))
numbers = torch.zeros(1 << 18)
threads = lambda: [thread.name for thread in threading.enumerate()]

def spins():
    "Whether the other thread uses its core for a good part of pauses of 2 ms."
    numbers.add_(1)
    start = time.process_time()
    for _ in range(50):
        numbers.add_(1)
        time.sleep(0.002)
    return time.process_time() - start > 0.03

def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
"""


SERVER = """
import os, sys, torch  # no threads yet: they would not be there after a fork
for code in sys.stdin:
    if (process := os.fork()) == 0:
        exec(eval(code), {})
        print(flush=True)
        os._exit(0)
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
Run = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs code in a forked process of Python with torch's default of waiting; returns the words that it prints."""
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environ |= {"OMP_NUM_THREADS": "2"}
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True) as server:

        def run_code(code: str) -> list[str]:
            print(repr(CODE + code), file=server.stdin, flush=True)
            words: list[str] = []
            while words[-3:-1] != ["exit", "code"]:
                line = server.stdout.readline()
                assert line
                words += line.split()
            assert words[-1] == "0"
            return words[:-3]

        yield run_code


@needs_cores
def test_spinning_adapts_to_the_share_of_waiting(run: Run) -> None:
    """Catches a team that does not stop the spinning or stays forever, and a change at each look near one limit."""
    code = """
spinning = Spinning(load_openmp(), cores)
for share, expected in (0.0, True), (0.1, True), (0.5, False), (0.1, False), (0.0, True), (0.1, True):
    spinning.adapt(share)
    wait_until(lambda: spins() == expected)  # on a busy machine the other thread may not have been running
    print(threads().count("sleeping-team"), end=" ")
"""
    assert run(code) == ["0", "0", "1", "1", "0", "0"]


@needs_cores
def test_threads_do_not_spin_beside_busy_processes(run: Run) -> None:
    """Catches times of waiting that are not found, and a watching thread that ends."""
    code = """
share_cores()
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
try:
    end = time.monotonic() + 60
    while "sleeping-team" not in threads():
        assert time.monotonic() < end
        numbers.add_(1)
finally:
    for process in busy:
        process.kill()
"""
    run(code)


@needs_cores
def test_which_processes_watch_themselves(run: Run) -> None:
    """Catches GOMP_SPINCOUNT without effect, a second thread that watches, one beside a single computing thread or in a
    process that is bound to a core, and a forked process without one because its parent has one."""
    code = """
def watching():
    share_cores()
    print(threads().count("share-cores"), end=" ", flush=True)

os.environ["GOMP_SPINCOUNT"] = "300000"
watching()
del os.environ["GOMP_SPINCOUNT"]
share_cores.cache_clear()
torch.set_num_threads(1)
watching()
torch.set_num_threads(2)
share_cores.cache_clear()
watching()
watching()
if os.fork() == 0:
    watching()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # as MPI and srun bind ranks
    if os.fork() == 0:
        watching()
        os._exit(0)
    os.wait()
    os._exit(0)
os.wait()
"""
    assert run(code) == ["0", "0", "1", "1", "1", "0"]


def test_too_few_threads_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a call of OpenMP, which ends the process if a thread cannot be started."""
    started: list[Any] = []

    class Thread:
        def __init__(self, target: Callable[[], object], **_: Any) -> None:
            self.target = target

        def start(self) -> None:
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            started.append(self)

        def join(self) -> None:
            assert self.target()

    monkeypatch.setattr("threading.Thread", Thread)
    with pytest.raises(RuntimeError, match="start new thread"):
        Spinning(None, cores=3).adapt(1.0)  # type: ignore[arg-type]
    assert len(started) == 3


def test_the_share_of_waiting() -> None:
    """Catches a share that falls when a thread ends, one that counts how long a new thread waited before, and a
    server's threads that wait for those that compute."""
    second = 1_000_000_000
    before = {thread: ThreadTimes(9 * second, 5 * second) for thread in (1, 2, 3, 4)}
    after = {
        1: ThreadTimes(9 * second + 1500, 5 * second + second // 10),
        2: ThreadTimes(9 * second + 1600, 5 * second + second * 4 // 10),
        3: ThreadTimes(9 * second + 20, 5 * second + second),
        5: ThreadTimes(30 * second, 7 * second),
    }
    assert waiting_share(before, after, team=2, seconds=2.0) == pytest.approx(0.2)
    assert waiting_share({}, after, team=2, seconds=2.0) == 0


@pytest.mark.parametrize(
    ("module", "function", "preparation"),
    [
        ("finetune.run", "run", "prepare_process"),
        ("finetune.parallel_seeds", "main", "prepare_process"),
        ("finetune.probe", "main", "prepare_process"),
        ("finetune.prediction.predict", "predict_command", "prepare_process"),
        ("finetune.serve.server", "serve_command", "prepare_process"),
        ("pretrain.evaluate", "evaluate", "share_cores"),
        ("pretrain.evaluate", "evaluate", "available_device"),
        ("finetune.device", "choose_device", "available_device"),
        ("experiment.process.hardware", "available_device", "hide_gpus"),
        ("experiment.process.hardware", "prepare_process", "hide_gpus"),
        ("pretrain.run", "_connect_and_pretrain", "share_cores"),
    ],
)
def test_each_process_that_computes_is_prepared(
    module: str, function: str, preparation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a command whose threads spin beside others, or whose memory is mapped again and again, and one that uses
    a GPU with DS_ACCELERATOR=cpu."""

    class PreparedError(Exception):
        pass

    def prepare() -> None:
        raise PreparedError

    loaded = importlib.import_module(module)
    monkeypatch.setattr(loaded, preparation, prepare)
    options = ServeOptions(model="model", port=0)
    arguments: dict[str, tuple[Any, ...]] = {
        "main": (["config.yaml", "1"],),
        "evaluate": ("", []),
        "serve_command": (options,),
        "choose_device": ("auto",),
    }
    given: tuple[Any, ...] = arguments.get(function, (None, None, None))
    with pytest.raises(PreparedError):
        getattr(loaded, function)(*given[: getattr(loaded, function).__code__.co_argcount])
