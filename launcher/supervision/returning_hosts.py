"""Hosts that a launch has lost: which of them answer again, and a watch that takes them back."""

import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

from experiment.process.signals import kill_group
from experiment.run_files.checkpoints import completed_saves
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.guarded_hosts import start_seconds
from launcher.hosts.ssh import SSH_FAILED, last_reason, start_ssh

_POLL_SECONDS = 10.0
_MAX_POLL_SECONDS = 120.0
_TIMED_OUT = 124  # exit code of `timeout`


def poll_intervals() -> Iterator[float]:
    """Yield polling intervals in seconds, with exponential backoff."""
    seconds = _POLL_SECONDS
    while True:
        yield seconds
        seconds = min(_MAX_POLL_SECONDS, 2 * seconds)


def unusable_hosts(hosts: Collection[str], folder: RunFolder) -> dict[str, str]:
    """Return the hosts that do not answer, or lack this Python or the run folder, and why. Asks all at once, and gives
    them as long as their guards have to start."""
    limit, reasons = start_seconds(len(hosts)), dict[str, str]()
    # `timeout` ends a look at a disk that does not answer: killing ssh does not.
    command = ["timeout", str(math.ceil(limit)), "test", "-x", sys.executable, "-a", "-d", str(folder.logs)]
    with ExitStack() as files:
        # Files, not pipes: a ProxyCommand may have the output open for longer than ssh.
        outputs = {host: files.enter_context(tempfile.TemporaryFile()) for host in hosts}
        processes = {
            host: start_ssh(host, command, subprocess.DEVNULL, subprocess.DEVNULL, output)
            for host, output in outputs.items()
        }
        deadline = time.monotonic() + limit
        for host, process in processes.items():
            try:
                exit_code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill_group(process.pid)
                process.wait()
                reasons[host] = f"no answer within {limit:.0f} s"
                continue
            if exit_code == SSH_FAILED:
                outputs[host].seek(0)
                reasons[host] = last_reason(outputs[host].read().decode(errors="replace"), "ssh failed")
            elif exit_code == _TIMED_OUT:
                reasons[host] = f"the disk of {sys.executable} or {folder.logs} does not answer within {limit:.0f} s"
            elif exit_code != 0:
                reasons[host] = f"there is no {sys.executable}, or no {folder.logs}"
    return reasons


@contextmanager
def watch_for_hosts(
    hosts: Collection[str],
    find_usable: Callable[[Collection[str]], Collection[str]],
    folder: RunFolder,
    on_return: Callable[[], object],
) -> Iterator[None]:
    """Call `on_return` in a thread when one of the missing hosts is usable again, after the next checkpoint: so the run
    advances, however often a host comes and goes. Not called after this ends."""
    ended, lock = threading.Event(), threading.Lock()

    def watch() -> None:
        for seconds in poll_intervals():
            if ended.wait(seconds):
                return
            if find_usable(hosts):
                before = completed_saves(folder.checkpoints) or set()
                while (completed_saves(folder.checkpoints) or set()) <= before:
                    if ended.wait(1.0):
                        return
                if find_usable(hosts):
                    # On a full disk, or if the user has made a STOP file, nothing happens.
                    with lock, suppress(OSError):
                        if not ended.is_set():
                            on_return()
                    return

    if hosts:
        threading.Thread(target=watch, name="returning hosts", daemon=True).start()
    try:
        yield
    finally:
        with lock:  # the thread may still wait for hosts that do not answer
            ended.set()
