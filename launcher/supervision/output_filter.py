"""Removes lines that tell the user nothing from what the processes of a launch print on other hosts.

DeepSpeed's launcher prints several for each host, and has no setting against it there.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

_NOISE = re.compile(
    rb"(\S+: )?("  # pdsh puts the host first
    rb"\[[-0-9]+ [:,0-9]+\] \[(INFO|WARNING)\] \[(launch|real_accelerator)\.py:"
    rb"|\[W.*\[c10d\] The hostname of the client socket cannot be retrieved)"
)


def is_noise(line: bytes) -> bool:
    return _NOISE.match(line) is not None


@contextmanager
def filtered_output(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Print what a process writes to its pipes, line by line, until it has ended."""
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [
        threading.Thread(target=_copy, args=(source, target.buffer), daemon=True) for source, target in pairs if source
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    with source:
        for line in source:
            if not is_noise(line):
                with suppress(OSError):  # the terminal may be closed
                    target.write(line)
                    target.flush()
