"""Ranks that have imported their modules wait until their launch lets them begin."""

import os
import time
from pathlib import Path

from experiment.file_locks import is_path_locked
from experiment.process.own_process import GATE_VARIABLE
from experiment.run_files.outcome_file import Outcome

_POLL_SECONDS = 0.01


def wait_at_gate() -> None:
    """Wait until the launch that has started this process lets it begin. Ends the process if the launch has ended: one
    that is killed early has not yet started the watchdog that ends its ranks."""
    if (path := os.environ.pop(GATE_VARIABLE, None)) is None:
        return
    gate = Path(path)
    while not gate.exists():
        if is_path_locked(gate.parent) is False:
            os._exit(Outcome.REFUSED.exit_code)  # skips the slow teardown of imported libraries
        time.sleep(_POLL_SECONDS)
