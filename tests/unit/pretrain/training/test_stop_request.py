import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from experiment import files
from experiment.files import exists_uncached
from pretrain.training import stop_request
from pretrain.training.stop_request import StopRequest, receive_stop_requests
from waiting import wait_until


def is_watched() -> bool:
    return any(thread.name.startswith("stop ") for thread in threading.enumerate())


def training(stop_file: Path | None) -> StopRequest:
    stop = StopRequest()
    stop.begin_training(stop_file)
    return stop


def reasons_while_blocked(ask: Callable[[], object], stop_file: Path | None = None) -> list[str]:
    """What ends a process that is asked to stop while its main thread is blocked outside of Python, where no signal
    interrupts it."""
    reasons: list[str] = []
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    release = partial(libc.pthread_mutex_unlock, mutex)

    def end_process(reason: str) -> None:
        reasons.append(reason)
        release()

    def give_up() -> None:
        reasons.append("nothing ended it")
        release()

    fallback = threading.Timer(120, give_up)
    fallback.start()
    libc.pthread_mutex_lock(mutex)
    with receive_stop_requests(StopRequest(end_process), stop_file):
        threading.Timer(0.1, ask).start()
        libc.pthread_mutex_lock(mutex)
        fallback.cancel()
    wait_until(lambda: not is_watched())
    return reasons


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_is_handled_while_the_main_thread_is_blocked(number: signal.Signals) -> None:
    """Catches a rank that cannot be stopped while it connects or builds: Python's handlers wait for the main thread."""
    assert reasons_while_blocked(lambda: os.kill(os.getpid(), number)) == [f"signal {number.name}"]


def test_a_stop_file_before_training_is_found_while_the_main_thread_is_blocked(tmp_path: Path) -> None:
    """Catches a STOP file that has no effect while corpora are verified or the model is built."""
    stop_file = tmp_path / "STOP"
    assert reasons_while_blocked(stop_file.touch, stop_file)[0] == f"found {stop_file}"


def test_signals_are_counted_once(tmp_path: Path) -> None:
    """Catches a request during training, or after it, that ends the process without a checkpoint."""
    received: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(received.append, received.append)
    with receive_stop_requests(stop, tmp_path / "STOP"):
        stop.begin_training(None)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.reason)
        assert stop.reason == "signal SIGTERM"
        (tmp_path / "STOP").touch()
        stop.ignore_second()
        os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: not is_watched())
    assert received == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_thread_ends_without_training() -> None:
    """Catches a thread that outlives a rank that failed before training."""
    with receive_stop_requests(StopRequest(), None):
        assert is_watched()
    wait_until(lambda: not is_watched())


def test_a_stop_file_found_late_is_left_to_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slow network disk whose answer, when training has begun, ends the process without a checkpoint."""
    received: list[str] = []
    asked, answer = threading.Event(), threading.Event()

    def exists_uncached(_: Path) -> bool:
        asked.set()
        return answer.wait(120)

    monkeypatch.setattr(stop_request, "exists_uncached", exists_uncached)
    stop = StopRequest(received.append)
    with receive_stop_requests(stop, tmp_path / "STOP"):
        assert asked.wait(120)
        stop.begin_training(None)
        answer.set()
        wait_until(lambda: stop.reason)
    assert (stop.reason, received) == (f"found {tmp_path / 'STOP'}", [])


def test_a_stop_file_of_another_machine_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that sees STOP a minute late: NFS remembers that a name does not exist, until the folder is
    listed."""
    stop_file, seen = tmp_path / "STOP", set[str]()
    stop_file.touch()
    names_in = files.names_in

    def listed(folder: Path) -> list[str]:
        seen.update(names_in(folder))
        return names_in(folder)

    monkeypatch.setattr(files, "names_in", listed)
    monkeypatch.setattr(Path, "exists", lambda path: path.name in seen)
    stop = training(stop_file)
    assert stop.reason == f"found {stop_file}"
    assert reasons_while_blocked(lambda: None, stop_file)[0] == f"found {stop_file}"


def test_a_disk_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails, or can no longer be stopped, because a network disk was not there for a moment."""
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    failures = [OSError(errno.ESTALE, "Stale file handle")]

    def unsteady(path: Path) -> bool:
        if failures:
            raise failures.pop()
        return exists_uncached(path)

    monkeypatch.setattr(stop_request, "exists_uncached", unsteady)
    now = 100.0
    monkeypatch.setattr("pretrain.training.stop_request.time.monotonic", lambda: now)
    stop = training(stop_file)
    assert stop.reason is None
    now += 1.0
    assert stop.reason == f"found {stop_file}"
    failures.append(OSError(errno.ESTALE, "Stale file handle"))
    assert reasons_while_blocked(lambda: None, stop_file)[0] == f"found {stop_file}"


def test_a_second_signal_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that hangs and that only SIGKILL ends, or the one signal that is taken for two. Its main thread
    may be blocked, such as by a disk that does not answer whether there is a STOP file; a second signal is one that
    comes after a second."""
    monkeypatch.setattr("experiment.process.signals.REPEATED_SECONDS", 0.0)
    monkeypatch.setattr(stop_request, "exists_uncached", lambda _: threading.Event().wait(120))
    received: list[str] = []
    stop = StopRequest(end_at_once=received.append)
    stop.begin_training(tmp_path / "STOP")
    with receive_stop_requests(stop, tmp_path / "STOP"):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: stop._reason)
        assert stop.reason == "signal SIGUSR1"
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: received)
        assert stop.reason == "signal SIGUSR1"
        stop.ignore_second()
        os.kill(os.getpid(), signal.SIGUSR2)
    wait_until(lambda: not is_watched())
    assert received == ["a second signal, SIGUSR2"]


def test_signals_arrive_while_the_disk_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that no signal reaches in training, because a look for the STOP file began before it."""
    monkeypatch.setattr("experiment.process.signals.REPEATED_SECONDS", 0.0)
    asked, answer = threading.Event(), threading.Event()

    def exists_uncached(_: Path) -> bool:
        asked.set()
        answer.wait(120)
        return False

    monkeypatch.setattr(stop_request, "exists_uncached", exists_uncached)
    received: list[str] = []
    stop = StopRequest(end_at_once=received.append)
    with receive_stop_requests(stop, tmp_path / "STOP"):
        assert asked.wait(120)
        stop.begin_training(None)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: stop.reason)
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: received)
    answer.set()
    wait_until(lambda: not is_watched())
    assert (stop.reason, received) == ("signal SIGUSR1", ["a second signal, SIGUSR2"])


# A rank, which its launcher has started with these signals blocked.
RANK = """
import os, signal, sys, threading
from pretrain.training.stop_request import StopRequest, receive_stop_requests
blocked = {{signal.SIGUSR1, signal.SIGUSR2}}
signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
received, done = [], threading.Event()
def end(reason):
    received.append(reason)
    done.set()
{body}
"""
WARNED = """
os.kill(os.getpid(), signal.SIGUSR1)
with receive_stop_requests(StopRequest(end), None):
    done.wait(120)
print(received)
"""
STARTS_ANOTHER = """
import subprocess
mask = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
with receive_stop_requests(StopRequest(end), None):
    subprocess.run([sys.executable, "-c", mask], check=True)
    thread = threading.Thread(target=subprocess.run, args=([sys.executable, "-c", mask],))
    thread.start()
    thread.join()
"""


def output_of_rank(body: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", RANK.format(body=body)], check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout


def test_a_warning_that_was_blocked_is_received() -> None:
    """Catches a warning to a rank that imports its modules, while the launcher's mask still blocks it, that is lost."""
    assert output_of_rank(WARNED) == "['signal SIGUSR1']\n"


def test_no_signal_to_all_processes_ends_what_a_rank_has_started() -> None:
    """Catches compilers and W&B that end because a batch system signals all processes of a job."""
    assert output_of_rank(STARTS_ANOTHER) == f"{sorted(map(int, SIGNALS))}\n" * 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_requests_a_stop(number: signal.Signals) -> None:
    """Catches a signal that ends the rank at once, and signal handlers that are not restored."""
    before = signal.getsignal(number)
    stop = training(None)
    with receive_stop_requests(stop, None):
        assert stop.reason is None
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.reason)
        assert stop.reason == f"signal {number.name}"
    assert signal.getsignal(number) == before


def test_a_stop_file_requests_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file that is checked for only once, or at every step, which is slow on a network disk."""
    now = 100.0
    monkeypatch.setattr("pretrain.training.stop_request.time.monotonic", lambda: now)
    stop = training(tmp_path / "STOP")
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    now += 0.1
    assert stop.reason is None, "checked again after 0.1 s"
    now += 1.0
    assert stop.reason == f"found {tmp_path / 'STOP'}"
    (tmp_path / "STOP").unlink()
    assert stop.reason is not None, "a request cannot be withdrawn"
