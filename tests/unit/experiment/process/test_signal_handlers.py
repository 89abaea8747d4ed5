import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiment.process.signals import handle_stop_signals
from runs import soak
from waiting import LIMIT

REPOSITORY = Path(__file__).parents[4]
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def under_nohup() -> Iterator[None]:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_stop_signals_are_passed_on_and_restored() -> None:
    """Catches a signal that kills the command instead, and a handler that stays after the ranks have exited."""
    before = signal.getsignal(signal.SIGTERM)
    received: list[int] = []
    with handle_stop_signals(received.append):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    assert received == STOP_SIGNALS
    assert signal.getsignal(signal.SIGTERM) is before


# Each step lasts until a file says that the signal has been sent, which interrupts the first one.
COMMAND = """
import atexit, sys, time
from pathlib import Path
from launcher import cli, launch
from experiment.process.signals import handle_stop_signals, interrupt

def step(name):
    print(name, flush=True)
    while not Path(sys.argv[1], name).exists():
        time.sleep(0.01)

def launch_pretraining(*_):
    with handle_stop_signals(interrupt):
        try:
            step("working")
        finally:
            step("cleaning up")
            print("clean", flush=True)

launch.launch_pretraining = launch_pretraining
atexit.register(step, "exiting")
exit(cli.main(["pretrain", "--config", "x.yaml"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *soak(signal.SIGUSR1)])
def test_further_signals_change_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Catches a second Ctrl-C that leaves processes on other hosts, or with another exit code than the first one."""
    command = [sys.executable, "-c", COMMAND, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line.strip())
        process.send_signal(number)
        (tmp_path / seen[-1]).touch()
    assert process.wait(LIMIT) == 75
    assert seen == ["working", "cleaning up", "clean", "exiting"]


def test_nohup_keeps_sighup_ignored(under_nohup: None) -> None:
    """Catches a command under nohup that stops at logout."""
    received: list[int] = []
    with handle_stop_signals(received.append):
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
