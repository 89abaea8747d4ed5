"""Threads sleep instead of spinning while other processes use the cores."""

import os
import subprocess
import sys

import pytest

from experiment.shared_cores import waiting_share

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)

CODE = """
import ctypes, os, signal, subprocess, sys, time
import torch
from experiment.shared_cores import Spinning, openmp_path, share_cores

numbers = torch.zeros(1 << 18)

def spins():
    "Whether the other thread uses its core for a good part of pauses of 2 ms."
    numbers.add_(1)
    start = time.process_time()
    for _ in range(50):
        numbers.add_(1)
        time.sleep(0.002)
    return time.process_time() - start > 0.03
"""


def run(code: str, **variables: str) -> str:
    """The output of Python with torch's default of waiting."""
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environ |= {"OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run([sys.executable, "-c", CODE + code], env=environ, capture_output=True, text=True, check=True)
    return done.stdout


def test_spinning_adapts_to_the_share_of_waiting() -> None:
    """Catches a team that does not stop the spinning or stays for ever, and a change at each look near one limit."""
    code = """
spinning = Spinning(ctypes.CDLL(openmp_path()))
for share in (0.0, 0.05, 0.5, 0.05, 0.0, 0.05):
    spinning.adapt(share)
    print(spins(), end=" ")
"""
    assert run(code).split() == ["True", "True", "False", "False", "True", "True"]


BESIDE_OTHERS = """
share_cores()
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
try:
    end = time.monotonic() + 60
    while (spinning := spins()) and time.monotonic() < end:
        pass
    print(spinning)
finally:
    for process in busy:
        process.kill()
"""


def test_threads_do_not_spin_beside_busy_processes() -> None:
    """Catches times of waiting that are not found, and a watching thread that ends."""
    assert run(BESIDE_OTHERS).splitlines()[-1] == "False"


def test_the_users_choice_stands() -> None:
    """Catches GOMP_SPINCOUNT without effect, and a second thread that watches."""
    code = "import threading\nshare_cores()\nshare_cores()\nprint(threading.active_count())\n"
    assert (run(code), run(code, GOMP_SPINCOUNT="300000")) == ("2\n", "1\n")


def test_the_share_of_waiting() -> None:
    """Catches a share that falls when a thread ends, and one that counts what a new thread waited before."""
    before = {"1": 5_000_000_000, "2": 1_000_000_000, "3": 9_000_000_000}
    after = {"1": 5_100_000_000, "2": 1_300_000_000, "4": 7_000_000_000}
    assert waiting_share(before, after, seconds=2.0) == pytest.approx(0.2)
