import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from experiment.run_files.heartbeat import Heartbeat, main_stack, read_heartbeat, request_stack
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launches import patched
from pretrain.rank_heartbeat import _compiles
from waiting import LIMIT, wait_until

# Stands for a rank: its main thread does what {body} says.
# Between two beats, 0.025 s pass on the clock of its heartbeat, however busy the machine is.
RANK = """
import itertools, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from experiment.run_files.goodput import ActivityTimer
from experiment.run_files.run_folder import RunFolder
from pretrain import rank_heartbeat
from pretrain.rank_heartbeat import RankHeartbeat
looks = itertools.count()
rank_heartbeat.time = SimpleNamespace(monotonic=lambda: 0.025 * next(looks), sleep=time.sleep)
heartbeat, times = RankHeartbeat(RunFolder(Path({path!r})), 3, hang_seconds=1.0), ActivityTimer(time.time())
heartbeat.start()
def mark():
    Path({path!r}, "blocked").touch()
def blocked():
    mark()
    threading.Event().wait(600)
{body}
"""
TRAINS = "heartbeat.follow(times); times.begin_training(); times.finish_step(7)\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


@pytest.fixture
def processes() -> "Iterator[list[subprocess.Popen[bytes]]]":
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def rank(folder: RunFolder, body: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", RANK.format(path=str(folder.path), body=body)])


def last_beat(folder: RunFolder) -> Heartbeat:
    wait_until(lambda: read_heartbeat(folder, 3))
    beat = read_heartbeat(folder, 3)
    return beat if beat is not None else last_beat(folder)


def test_a_rank_without_progress_writes_its_stack(
    folder: RunFolder, processes: "list[subprocess.Popen[bytes]]"
) -> None:
    """Catches a rank that hangs in one call, and of which nothing but the process id is known."""
    processes.append(rank(folder, TRAINS + "blocked()"))
    wait_until(lambda: last_beat(folder).stuck_seconds > 0.8, processes[0])
    beat = last_beat(folder)
    assert (beat.rank, beat.pid, beat.step, beat.activity, beat.waits) == (3, processes[0].pid, 7, "training", False)
    assert any("in blocked" in frame for frame in main_stack(folder.rank_log(3), 0))


def test_a_rank_that_has_stopped_writes_its_stack_when_asked(
    folder: RunFolder, processes: "list[subprocess.Popen[bytes]]"
) -> None:
    """Catches a rank under SIGSTOP, which runs no code of its own, without a stack."""
    processes.append(rank(folder, "blocked()"))
    last_beat(folder)
    wait_until((folder.path / "blocked").exists, processes[0])
    processes[0].send_signal(signal.SIGSTOP)
    assert main_stack(folder.rank_log(3), 0) == []
    request_stack(processes[0].pid)
    wait_until(lambda: any("in blocked" in frame for frame in main_stack(folder.rank_log(3), 0)), processes[0])


WAITS_FOR_GPUS = [
    """
import torch
from pretrain.engine.host_copy import HostCopy
class Event:
    def record(self): ...
    def query(self):
        return False
torch.cuda.Event = Event
torch.Tensor.pin_memory = lambda tensor: tensor
copy = HostCopy(torch.zeros(1))
mark()
copy.wait()
""",
    """
from pretrain.engine.host_copy import read_numbers
lock = threading.Lock()
lock.acquire()
mark()
read_numbers(SimpleNamespace(tolist=lock.acquire))
""",
    """
import contextlib, torch
lock = threading.Lock()
lock.acquire()
torch.cuda._lazy_init, torch.cuda.device = lambda: None, contextlib.nullcontext
torch._C._cuda_synchronize = lock.acquire
mark()
torch.cuda.synchronize()
""",
]


@pytest.mark.parametrize("body", WAITS_FOR_GPUS, ids=["copy", "read", "synchronize"])
def test_a_rank_that_waits_for_its_gpu_is_not_to_blame(
    folder: RunFolder, processes: "list[subprocess.Popen[bytes]]", handed_over: Mapping[str, str], body: str
) -> None:
    """Catches a rank that is named in place of the one that it waits for."""
    code = RANK.format(path=str(folder.path), body=TRAINS + body)
    forked = os.environ | handed_over | patched(folder.path, code)  # it has imported torch
    processes.append(subprocess.Popen([sys.executable, "-m", "pretrain.run"], env=forked))
    wait_until((folder.path / "blocked").exists, processes[0])
    imported = last_beat(folder).number + 1  # modules of torch.distributed, too
    wait_until(lambda: last_beat(folder).number > imported and last_beat(folder).waits, processes[0])


@pytest.mark.parametrize(
    "body",
    [
        "blocked()",  # it starts: loading a large model may take long
        TRAINS + "\nwhile True: times.make_progress(); time.sleep(0.01)",
        TRAINS + "times.end_training(); blocked()",
    ],
)
def test_a_rank_that_works_is_not_stuck(
    folder: RunFolder, processes: "list[subprocess.Popen[bytes]]", body: str
) -> None:
    """Catches a run that is ended during a long evaluation, while it starts, or while W&B uploads at its end."""
    processes.append(rank(folder, body))
    wait_until(lambda: last_beat(folder).number > 60, processes[0])  # 1.5 times the timeout
    assert last_beat(folder).stuck_seconds < 0.8
    assert main_stack(folder.rank_log(3), 0) == []


def test_compiled_code_that_runs_is_not_being_compiled() -> None:
    """Catches a rank that blocks in a compiled layer, and is taken for one that compiles forever."""
    seen = {}

    def compile_graph(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen["compiling"] = _compiles(sys._getframe())

        def run(*inputs: torch.Tensor) -> object:
            seen["running"] = _compiles(sys._getframe())
            return graph(*inputs)

        return run

    torch.compile(torch.nn.ReLU(), backend=compile_graph)(torch.ones(2))
    assert seen == {"compiling": True, "running": False}


def test_looking_at_the_main_thread_stops_no_other() -> None:
    """Catches a deadlock of Python 3.11.0 to 3.11.11, if garbage is collected while the heartbeat looks at the frames
    of all threads and the main thread starts another one."""
    code = """
import gc, threading, time
from pretrain.rank_heartbeat import _main_frame
def watch():
    while True:
        assert _main_frame() is not None
gc.callbacks.append(lambda *_: time.sleep(0))  # as a finalizer: other threads run
gc.set_threshold(1)
threading.Thread(target=watch, daemon=True).start()
for _ in range(300):
    started = threading.Thread(target=int)
    started.start()
    started.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
