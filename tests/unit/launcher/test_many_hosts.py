"""Hundreds of hosts with eight ranks each, as stand-ins: nothing takes longer than seconds, or grows faster than the
hosts."""

import itertools
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiment.process.own_process import raise_limit_of_open_files
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, write_outcome
from experiment.run_files.run_folder import open_run_folder
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.hostfile import parse_hostfile
from launcher.hosts.machine import Devices, Machine
from launcher.ranks.deepspeed_command import DeepSpeedCommand, command_on_hosts
from launcher.supervision.attempt import LaunchSettings, Layout
from launcher.supervision.launch_result import read_result
from launcher.supervision.supervisor import supervise
from runs import soak
from stand_in_hosts import STAND_IN_GUARD, install_ssh

ROOT = Path(__file__).parents[3]
HOSTS = [f"node-{number}.cluster.example.org" for number in range(512)]
SLOTS = {host: tuple(range(8)) for host in HOSTS}
LOST = HOSTS[7]
MOST_BYTES_OF_AN_ARGUMENT = 128 << 10  # MAX_ARG_STRLEN of Linux

# A guard that answers like a real one, and a host that does not answer.
SSH = f"""
case "$1" in {LOST}) exit 255;; esac
case "$2" in *host_guard*) ;; *) exit 0;; esac
{STAND_IN_GUARD}"""
RANKS = """
import sys
from pathlib import Path
from experiment.process.own_process import raise_limit_of_open_files
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder
write_outcome(RunFolder(Path(sys.argv[1])), Outcome.DONE)
"""


@pytest.fixture(autouse=True)
def in_seconds() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < 20, "CPU time of this process: a busy machine makes no difference"


@pytest.fixture
def open_files() -> Iterator[Callable[[int], None]]:
    """Sets the soft limit of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, before[0]), before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("count", "limit"), [(64, 128), *soak((512, 1024))])  # 1024: of most systems
def test_a_lost_host_of_many_is_left_out(
    open_files: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, limit: int
) -> None:
    """Catches file descriptors that run out, and a run that needs all of its hosts."""
    open_files(limit)
    raise_limit_of_open_files()
    slots = dict(itertools.islice(SLOTS.items(), count))
    install_ssh(tmp_path / "bin", monkeypatch, before=SSH)
    folder = open_run_folder(tmp_path / "run")
    seen: list[tuple[Layout, Rendezvous | None]] = []

    def command(layout: Layout, rendezvous: Rendezvous | None) -> DeepSpeedCommand:
        seen.append((layout, rendezvous))
        return DeepSpeedCommand((sys.executable, "-c", RANKS, str(folder.path)), {"PYTHONPATH": str(ROOT)})

    result = supervise(LaunchSettings(folder, slots, command, local=False, max_restarts=1))
    assert result.outcome is Outcome.DONE, result
    first, second = [json.loads(line) for line in folder.launches.read_text().splitlines()]
    assert (len(first["hosts"]), first["cause"]) == (count, Cause.LOST_HOST)
    assert second["hosts"].keys() == slots.keys() - {LOST}
    ((layout, rendezvous),) = seen
    assert (len(layout.slots), rendezvous.address, rendezvous.port) == (count - 1, "10.0.0.1", 4567)


def test_the_command_line_of_many_hosts(tmp_path: Path) -> None:
    """Catches arguments that Linux rejects, and a hostfile that DeepSpeed reads differently."""
    arguments = ("--config", str(tmp_path / "launch.yaml"))
    machine = Machine(Devices("cpu", (0, 1)), environ={}, find_port=lambda: 4567)
    command = command_on_hosts(SLOTS, arguments, machine, tmp_path, "pdsh", {}, None)
    assert max(map(len, command.argv)) < MOST_BYTES_OF_AN_ARGUMENT
    assert len(parse_hostfile(command.files[tmp_path / "hostfile"])) == 512


def test_the_failure_of_one_rank_of_many_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logs of weeks that are read as a whole."""
    folder = open_run_folder(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of 1024 records
    for rank in range(1024):
        RankRecord(rank, HOSTS[rank // 8], rank, exit=None if rank == 77 else 1).write(folder)
        folder.rank_log(rank).write_text("step 1\n" * 1000)
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: lost its peer", Cause.LOST_RANK)
    killed = [RankRecord(77, HOSTS[9], 77)]
    ranks = Counter(dict.fromkeys(HOSTS[:128], 8))
    result = read_result(folder, 247, {}, killed, remote=True, ranks=ranks)
    assert result.message.startswith(f"rank 77 on {HOSTS[9]} (process 77) was killed by SIGKILL")
    assert result.cause is Cause.KILLED
    folder.outcome.unlink()
    assert "the end of rank-" in read_result(folder, 1, {}, killed, remote=True, ranks=ranks).message
