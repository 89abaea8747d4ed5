"""Hosts that a launch has lost: which of them answer again, and a watch that takes them back."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

from experiment.run_files.checkpoints import saves
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.ssh import ssh_argv

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 10.0
_SECONDS_PER_HOST = 0.05  # to start ssh
_POLL_SECONDS = 10.0


def usable_hosts(hosts: Collection[str], folder: RunFolder) -> set[str]:
    """Return the hosts that answer within seconds and have this Python and the run folder. Asks all at once."""
    command = ["test", "-x", sys.executable, "-a", "-d", str(folder.logs)]
    processes = {
        host: subprocess.Popen(
            ssh_argv(host, command, _CONNECT_SECONDS),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for host in hosts
    }
    deadline = time.monotonic() + _ANSWER_SECONDS + _SECONDS_PER_HOST * len(hosts)
    return {host for host, process in processes.items() if _exit_code(process, deadline) == 0}


def _exit_code(process: "subprocess.Popen[bytes]", deadline: float) -> int:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


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
        while not ended.wait(_POLL_SECONDS):
            if find_usable(hosts):
                before = saves(folder.checkpoints) or set()
                while (saves(folder.checkpoints) or set()) <= before:
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
