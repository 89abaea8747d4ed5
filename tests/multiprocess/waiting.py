"""Wait for an event, not for a time: a busy machine may take ten times longer than an idle one."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

LIMIT = 600.0  # seconds; less than the `timeout` of pytest, which then says less


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[Any] | None" = None) -> None:
    """Wait until `condition()` is true. Fails if the process that should make it true exits first. Asks less often the
    longer it takes: some conditions start processes, or look at all that there are."""
    start = time.monotonic()
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"exited with code {process.returncode}: {process.communicate()}")
        waited = time.monotonic() - start
        assert waited < LIMIT, f"waited {LIMIT:.0f} s in vain"
        time.sleep(max(0.02, min(0.2, waited / 50)))
