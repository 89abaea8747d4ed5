"""The fixture `start`."""

from collections.abc import Iterator

import psutil
import pytest

from launches import Start
from waiting import wait_until


@pytest.fixture
def left_behind() -> Iterator[list[psutil.Process]]:
    """Processes that must have ended after `start` has. Requested before it, so torn down after it."""
    processes: list[psutil.Process] = []
    yield processes
    wait_until(lambda: not any(is_running(process) for process in processes))


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_what_a_command_leaves_behind_is_killed(left_behind: list[psutil.Process], start: Start) -> None:
    """Catches ranks that slow down later tests, because the command that started them has ended."""
    command = start("sh", "-c", "sleep 3600 > /dev/null 2>&1 & echo $!")
    output, _ = command.communicate()
    left_behind.append(psutil.Process(int(output)))
    assert is_running(left_behind[0])
