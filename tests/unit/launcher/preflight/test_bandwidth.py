"""The timed all-reduce: how it is started, and what it reports."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from launcher.hosts.machine import Devices, Machine
from launcher.preflight import bandwidth
from launcher.preflight.bandwidth import RESULT_MARK, Measurement, MeasurementError, measure
from launcher.preflight.measure import _ranks_by_host, _rounds
from launcher.preflight.target import target_of_hosts
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.ranks.placement import HostOptions
from stand_in_hosts import install_ssh

MACHINE = Machine(Devices("cpu", (0, 1)), environ={}, find_port=lambda: 29500)
SLOTS = {"node-1": (0,), "node-2": (0,)}
TARGET = target_of_hosts(SLOTS, MACHINE, HostOptions())
RESULT = '{"ranks": 2, "bytes": 1048576, "seconds": 0.1, "compute_seconds": [0.1, 0.2], "link_bandwidths": [1e9, 1e9]}'


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_ssh(tmp_path / "bin", monkeypatch)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Python code that stands for DeepSpeed's launcher."""
    code: list[str] = []
    monkeypatch.setattr(bandwidth, "command_on_hosts", lambda *_: DeepSpeedCommand((sys.executable, "-c", *code), {}))
    return code


def test_the_result_is_found_among_other_output(program: list[str]) -> None:
    """Catches pdsh, which puts the host before each line, and the empty lines of the ranks."""
    program.append(f"print('node-1: warning\\nnode-1: {RESULT_MARK}' + {RESULT!r} + '')")
    measured = measure(SLOTS, MACHINE, TARGET)
    assert measured == Measurement(2, 1 << 20, 0.1, (0.1, 0.2), (1e9, 1e9))


def test_a_failure_shows_the_end_of_the_output(program: list[str]) -> None:
    program.append("print('first\\n' * 100 + '\\nnode-1: ModuleNotFoundError: pydantic\\n\\n')")
    with pytest.raises(
        MeasurementError, match=r"(?s)the end of its output:\n.*ModuleNotFoundError: pydantic$"
    ) as raised:
        measure(SLOTS, MACHINE, TARGET)
    assert str(raised.value).count("\n") == 15


def test_it_ends_in_time(program: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a preflight that waits forever for a host that hangs, with the processes that it has started."""
    monkeypatch.setattr(bandwidth, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(bandwidth, "_EXIT_SECONDS", 1.0)
    # The grandchild holds the pipe open.
    program.append(
        "import subprocess, sys; print('started', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'])"
    )
    with pytest.raises(MeasurementError, match=r"(?s)did not end within 2 s.*started"):
        measure(SLOTS, MACHINE, TARGET)


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 5, 8, 511, 512])
def test_neighbours_are_measured_in_few_rounds(hosts: int) -> None:
    """Catches links that share a host in a round, which would halve them, and rounds that grow with the hosts."""
    rounds = _rounds(hosts)
    assert len(rounds) <= 3
    for pairs in rounds:
        assert max(Counter(host for pair in pairs for host in pair).values()) == 1
    links = Counter(host for pairs in rounds for pair in pairs for host in pair)
    assert links == ({} if hosts == 1 else dict.fromkeys(range(hosts), 1 if hosts == 2 else 2))


def test_ranks_are_told_apart_by_host() -> None:
    """Catches hosts with different numbers of GPUs, on which the first rank has another local rank than 0."""
    assert _ranks_by_host([3, 3, 3, 2, 2, 1]) == [range(3), range(3, 5), range(5, 6)]
