"""Settings of tests that start ranks."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launches import Start
from rank_pool import free_port

torch.set_num_threads(1)  # more threads only slow down models this small


@pytest.fixture
def start(tmp_path: Path, handed_over: Mapping[str, str]) -> Iterator[Start]:
    """Start commands, each in a session of its own, in an empty folder; kill what is left of them afterwards. Unless
    the test is marked `real_start`, commands of deepcloze are forked from a process that has imported everything."""
    processes: list[subprocess.Popen[str]] = []

    def run(*command: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "MASTER_PORT": str(free_port()),
        }
        environment |= handed_over
        environment |= variables
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        with suppress(ProcessLookupError):  # the group may have members although its first process has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
