"""Process groups: everything that a launch has started on this machine."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from experiment.signals import warnings_blocked


@contextmanager
def watchdog(group: int) -> Iterator[None]:
    """Kill the process group if this process dies, even by SIGKILL.

    A second process waits on a pipe, which closes when this process exits.
    """
    shell = 'read -r _; kill -s KILL -- "-$0"'
    with warnings_blocked():
        watchdog = subprocess.Popen(["sh", "-c", shell, str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.communicate()


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
