import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from experiment.errors import UserError
from experiment.process.own_process import GATE_VARIABLE
from experiment.process.signals import HANDLED_SIGNALS
from experiment.run_files.outcome_file import Outcome, RankRecord
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.supervision import rank_processes
from launcher.supervision.attempt import LaunchSettings
from launcher.supervision.rank_processes import ExitWatch, RankProcesses, filtered_output, held_ranks, is_noise, started
from launcher.supervision.supervisor import supervise
from waiting import wait_until

ROOT = Path(__file__).parents[4]

# Stands for DeepSpeed's launcher and a rank, which is a child of it and notes each look for its gate.
RANK = """
import os, sys, time
from pathlib import Path
from experiment.run_files.goodput import attempt_start
from experiment.run_files.outcome_file import Cause, Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder
from pretrain import gate
folder = Path({folder!r})
is_path_locked = gate.is_path_locked
def note_look(launch):
    with (folder / "looks").open("a") as looks:
        looks.write(".")
    return is_path_locked(launch)
gate.is_path_locked = note_look
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
(folder / "pid").write_text(str(os.getpid()))
(folder / "imported").touch()
gate.wait_at_gate()
(folder / "began").write_text(repr(attempt_start()))
{body}
"""

# Stands for `deepcloze`. With a second argument it gets a signal while DeepSpeed's launcher starts.
LAUNCHER = """
import json, os, signal, subprocess, sys, time
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from experiment.process.signals import handle_stop_signals, interrupt
from launcher.supervision.rank_processes import held_ranks
argv, early = json.loads(sys.argv[1]), sys.argv[2:]
popen = subprocess.Popen
def start(*arguments, **options):
    process = popen(*arguments, **options)
    if early:
        os.kill(os.getpid(), signal.SIGTERM)
    return process
subprocess.Popen = start
with handle_stop_signals(interrupt), held_ranks(DeepSpeedCommand(tuple(argv), os.environ), time.time()):
    time.sleep(3600)
"""


def rank(folder: Path, body: str = "") -> DeepSpeedCommand:
    argv = (sys.executable, "-c", RANK.format(folder=str(folder), body=body))
    return DeepSpeedCommand(argv, os.environ | {"PYTHONPATH": str(ROOT)})


def has_ended(folder: Path) -> bool:
    try:
        process = psutil.Process(int((folder / "pid").read_text()))
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def launcher(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    (folder / "tmp").mkdir()
    command = rank(folder)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(command.argv), *arguments],
        env={**command.environment, "TMPDIR": str(folder / "tmp")},
        stderr=subprocess.DEVNULL,
    )


def processes_with(path: Path) -> list[psutil.Process]:
    """Those with this path in their command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(path) in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_held_ranks_import_and_wait(tmp_path: Path) -> None:
    """Catches ranks that begin a run which is still being checked, and ones that never begin."""
    start_time = time.time() - 5
    with held_ranks(rank(tmp_path), start_time) as held:
        looks, began = tmp_path / "looks", tmp_path / "began"
        wait_until(lambda: began.exists() or (looks.exists() and looks.stat().st_size > 2))
        assert not began.exists()
        with held.begin() as process:
            assert process.wait() == 0
    assert float(began.read_text()) == start_time, "the ledger finds an attempt by it"


def test_ranks_of_a_refused_launch_are_killed(tmp_path: Path, temporary: Path) -> None:
    """Catches processes and files that a mistake in the config leaves."""
    with held_ranks(rank(tmp_path), time.time()):
        wait_until((tmp_path / "imported").exists)
    wait_until(lambda: has_ended(tmp_path))
    assert not (tmp_path / "began").exists()
    assert list(temporary.iterdir()) == []


def test_held_ranks_do_not_outlive_the_launcher(tmp_path: Path) -> None:
    """Catches ranks that wait forever for a launcher that was killed."""
    process = launcher(tmp_path)
    wait_until((tmp_path / "imported").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: has_ended(tmp_path))


def test_a_killed_watchdog_is_replaced(tmp_path: Path) -> None:
    """Catches ranks that train on without their launcher, because their watchdog was killed before it."""
    process = launcher(tmp_path)
    wait_until((tmp_path / "imported").exists, process)

    def watchdogs() -> list[psutil.Process]:
        found = []
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if child.name() == "sh":
                    found.append(child)
        return found

    wait_until(lambda: len(watchdogs()) == 1)
    (first,) = watchdogs()
    first.kill()
    wait_until(lambda: [child for child in watchdogs() if child != first])
    process.kill()
    process.wait()
    wait_until(lambda: has_ended(tmp_path))


def test_a_signal_while_the_ranks_are_started_leaves_none(tmp_path: Path) -> None:
    """Catches processes that nobody kills, because the signal comes before the launcher knows them."""
    process = launcher(tmp_path, "early")
    assert process.wait() != 0
    wait_until(lambda: not processes_with(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_no_signal_to_all_processes_ends_the_launcher_of_deepspeed() -> None:
    """Catches ranks that lose their launcher, and with it the time to save, when a batch system or systemd signals all
    processes of a job."""
    code = f"import signal, time\nwhile len(signal.sigpending()) < {len(HANDLED_SIGNALS)}: time.sleep(0.01)"
    with started(DeepSpeedCommand((sys.executable, "-c", code), os.environ), time.time()) as process:
        for number in HANDLED_SIGNALS:
            process.send_signal(number)
        assert process.wait() == 0


@pytest.mark.parametrize("folder", ["removed", "."])
def test_a_rank_ends_if_its_launch_is_gone(tmp_path: Path, folder: str) -> None:
    """Catches a rank that waits forever because it was not killed with its launcher. A launch that was killed leaves
    its folder, but no lock."""
    command = rank(tmp_path)
    environment = {**command.environment, GATE_VARIABLE: str(tmp_path / folder / "gate")}
    assert subprocess.run(command.argv, env=environment, check=False).returncode == 2
    assert not (tmp_path / "began").exists()


def test_ranks_that_lost_their_launcher_do_not_begin(tmp_path: Path) -> None:
    """Catches ranks that train for as long as a dead launcher is given to exit."""
    with held_ranks(rank(tmp_path), time.time()) as held:
        wait_until((tmp_path / "imported").exists)
        parent = psutil.Process(int((tmp_path / "pid").read_text())).parent()
        parent.kill()
        wait_until(lambda: parent.status() == psutil.STATUS_ZOMBIE)
        with held.begin() as process:
            assert process.wait() == -signal.SIGKILL
            wait_until(lambda: has_ended(tmp_path))
    assert not (tmp_path / "began").exists()


def test_ranks_without_a_watchdog_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that keep running because their watchdog could not be started."""
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        if processes:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        processes.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return processes[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(BlockingIOError), held_ranks(rank(tmp_path), time.time()):
        pass
    assert processes[0].returncode == -signal.SIGKILL


def test_a_removed_folder_is_named(tmp_path: Path, temporary: Path) -> None:
    """Catches a traceback after a cleaner of temporary files."""
    with held_ranks(rank(tmp_path), time.time()) as held:
        (folder,) = temporary.iterdir()
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=r"cannot create .*: No such file"), held.begin():
            pass


def test_a_restart_starts_ranks_of_its_own(tmp_path: Path) -> None:
    """Catches a second attempt that waits for the ranks of the first one, ranks that take part in two, and a record
    without the time for which held ranks have waited."""
    folder: RunFolder = open_run_folder(tmp_path / "run")
    body = "write_outcome(RunFolder(folder / 'run'), Outcome.{}, 'lost a rank', Cause.LOST_RANK)"
    launch = LaunchSettings(folder, {"localhost": (0,)}, lambda *_: rank(tmp_path, body.format("DONE")), max_restarts=1)
    began = time.time() - 100
    with held_ranks(rank(tmp_path, body.format("FAILED")), began) as held:
        result = supervise(replace(launch, start_time=began, held=held))
    assert result.outcome is Outcome.DONE
    first, second = [json.loads(line) for line in folder.launches.read_text().splitlines()]
    assert datetime.fromisoformat(first["time"]).timestamp() == int(began)
    assert datetime.fromisoformat(second["time"]).timestamp() > began + 90
    assert float((tmp_path / "began").read_text()) > began + 90


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        (b"node-2: [2026-11-21 00:03:50,219] [INFO] [launch.py:152:main] WORLD INFO DICT: {'node-1': [0]}\n", True),
        (b"[2026-11-21 00:03:32,555] [WARNING] [real_accelerator.py:213:get_accelerator] Setting\n", True),
        (
            b"node-1: [W1121 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved\n",
            True,
        ),
        (b"node-2: [2026-11-21 00:03:50,219] [ERROR] [launch.py:152:main] no such GPU\n", False),
        (
            b"node-1: [2026-11-28 03:11:13,851] [ERROR] [launch.py:259:sigkill_handler] ['python', '--local_rank=0'] "
            b"exits with return code = 75\n",
            True,
        ),
        (
            b"node-1: [2026-11-28 03:11:13,851] [ERROR] [launch.py:259:sigkill_handler] ['python', '--local_rank=0'] "
            b"exits with return code = -9\n",
            False,
        ),
        (b"pdsh@node-1: node-2: ssh exited with exit code 75\n", True),
        (b"pdsh@node-1: node-2: ssh exited with exit code 255\n", False),
        (b"node-1: step 1/1000 \xc2\xb7 loss 5.3\n", False),
        (b"\n", False),
    ],
)
def test_only_what_tells_nothing_is_removed(line: bytes, noise: bool) -> None:
    assert is_noise(line) == noise


@pytest.mark.parametrize("notebook", [False, True])
def test_both_streams_are_printed(
    notebook: bool, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches lost or reordered output, a last line without its end, and a notebook, whose streams take no bytes."""
    if notebook:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    code = "import sys; print('a'); print('b', file=sys.stderr); print('c', end='')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with filtered_output(process):
        process.wait()
    assert capfdbinary.readouterr() == (b"a\nc", b"b\n")


@pytest.mark.parametrize("failed", [1, 75, None], ids=["failed", "stopped", "killed"])
def test_ranks_that_outlive_a_failed_one_are_killed(
    failed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launch that waits 30 s for each rank that hangs in a collective, and one that kills ranks that have not
    failed, or the process that has the number of an ended rank by now."""
    folder = open_run_folder(tmp_path / "run")
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.0)
    survivor, other = (subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(2))
    try:
        RankRecord(0, "host", survivor.pid).write(folder)
        RankRecord(1, "host", other.pid, exit=0).write(folder)  # not a process of this launch
        processes = RankProcesses()
        with processes.running(survivor.pid):
            exits = ExitWatch(folder, processes, None)
            assert not exits.check()
            RankRecord(1, "host", other.pid, exit=failed).write(folder)
            assert exits.check()
        assert survivor.wait() == -signal.SIGKILL
        assert other.poll() is None
        assert [record.rank for record in exits.silent()] == ([] if failed else [1])
    finally:
        for process in (survivor, other):
            process.kill()
            process.wait()


def test_only_ranks_that_end_first_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that names the ranks that DeepSpeed's launcher has killed, and not the one that failed."""
    folder, ended = open_run_folder(tmp_path / "run"), 2**22 + 1  # the kernel's thread ids are at most 2^22
    exits = ExitWatch(folder, RankProcesses(), None)
    RankRecord(0, "host", ended, exit=1).write(folder)
    assert not exits.check()
    monkeypatch.setattr(rank_processes, "_FIRST_SECONDS", 0.0)
    RankRecord(1, "host", ended).write(folder)
    assert not exits.check()
    assert exits.silent() == []
    RankRecord(0, "host", ended, exit=0).write(folder)
    RankRecord(1, "host", ended, exit=0).write(folder)
    assert not exits.check()
    RankRecord(1, "host", ended).write(folder)
    assert [record.rank for record in exits.silent()] == [1], "no other has failed"


def test_ranks_that_end_soon_after_the_first_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is blamed because its guard is the first to notice that ranks have ended on several."""
    folder = open_run_folder(tmp_path / "run")
    exits = ExitWatch(folder, RankProcesses(), None)
    for rank in range(2):
        RankRecord(rank, f"node-{rank}", 2**22 + 1).write(folder)
        assert not exits.check()
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.0)
    assert exits.check()
    assert [record.rank for record in exits.silent()] == [0, 1]


def test_a_record_of_an_earlier_attempt_ends_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is killed because a host that was cut off writes a record of the attempt before it."""
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.0)
    folder = open_run_folder(tmp_path / "run")
    guards = SimpleNamespace(has_ended=lambda _, process: process == 7, ended_host=lambda: None)
    exits = ExitWatch(folder, RankProcesses(), guards)  # type: ignore[arg-type]
    RankRecord(0, "node-1", 6, exit=1).write(folder)
    assert not exits.check()
    RankRecord(0, "node-1", 7, exit=1).write(folder)
    assert exits.check()


def test_a_disk_that_does_not_answer_ends_no_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a watch that has ended because of an error of a network disk, when a rank fails later."""

    def fail(_: RunFolder) -> list[RankRecord]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(rank_processes, "read_rank_records", fail)
    assert not ExitWatch(open_run_folder(tmp_path / "run"), RankProcesses(), None).check()
