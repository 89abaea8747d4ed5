"""`deepcloze logs`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from experiment.run_files import run_lock
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import LockTimes, Owner, lock_run, this_machine
from launcher import logs
from launcher.cli import main


@pytest.fixture
def logged(tmp_path: Path) -> RunFolder:
    logged = open_run_folder(tmp_path / "run")
    for rank in (0, 1, 10):
        logged.rank_log(rank).write_text(f"message of rank {rank}\n")
    return logged


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["logs", *argv]) == 0
    return capsys.readouterr().out


def test_which_log_is_shown(logged: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the log of another rank, one of rank 0 in place of what the launch prints, and an empty one."""
    run = str(logged.path)
    assert shown(capsys, run) == "message of rank 0\n"
    assert shown(capsys, run, "--rank=10") == "message of rank 10\n"
    logged.launch_output.write_text("")  # of a launch with --quiet
    assert shown(capsys, run) == "message of rank 0\n"
    logged.launch_output.write_text("step 1\n")
    assert shown(capsys, run) == "step 1\n"
    assert shown(capsys, run, "--rank=0") == "message of rank 0\n"


def test_a_log_that_does_not_exist(logged: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or a message that does not say which logs there are."""
    assert main(["logs", str(logged.path), "--rank=2"]) == 2
    assert "has no log of rank 2; ranks with a log: 0, 1, 10" in capsys.readouterr().err
    empty = open_run_folder(tmp_path / "empty")
    empty.lock.touch()
    assert main(["logs", str(empty.path)]) == 2
    assert "has no log of rank 0; ranks with a log: none" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "none")]) == 2
    assert "there is no run folder" in capsys.readouterr().err


def test_a_run_that_has_ended_is_not_followed(logged: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that waits for a run that was killed, and one that floods the terminal first."""
    logged.rank_log(0).write_text("".join(f"{number}\n" for number in range(10_000)))
    logged.owner.write_text(json.dumps({**run_lock.this_machine(), "pid": 2**22 + 1}))
    assert shown(capsys, str(logged.path), "--follow") == "".join(f"{number}\n" for number in range(9_980, 10_000))


def test_a_run_is_followed_to_its_end(
    logged: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches lines that are lost between the last look at the file and the end of the run."""
    monkeypatch.setattr(logs, "_POLL_SECONDS", 0.0)
    additions = iter(["step 1\n", "step", " 2\n", "the last line\n"])

    def may_grow() -> bool:
        addition = next(additions)
        with logged.rank_log(0).open("a") as file:
            file.write(addition)
        return addition != "the last line\n"

    with logged.rank_log(0).open("rb") as file:
        logs.follow(file, may_grow)
    assert capsys.readouterr().out == "message of rank 0\nstep 1\nstep 2\nthe last line\n"


def test_ctrl_c_ends_it(logged: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a message about an interruption: there is no other way to end it."""

    def interrupt(file: IO[bytes], may_grow: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "follow", interrupt)
    assert main(["logs", str(logged.path), "--follow"]) == 0
    assert capsys.readouterr().err == ""


def test_a_pager_may_be_closed(logged: RunFolder) -> None:
    """Catches a traceback after `deepcloze logs RUN | head -1`."""
    logged.rank_log(0).write_text("line\n" * 100_000)
    command = [sys.executable, "-m", "launcher", "logs", str(logged.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_the_owner_of_a_run(logged: RunFolder) -> None:
    """Catches a run on another machine that is not followed, and the last line of a run, which is printed after its
    folder was released, that is missed."""
    owner = Owner(logged)
    assert not owner.is_alive()
    with lock_run(logged):
        assert owner.is_alive()
    assert owner.is_alive()  # this process
    assert not Owner(logged).is_alive()
    logged.owner.write_text(json.dumps({"host": "elsewhere", "boot": "1", "pid": os.getpid()}))
    assert Owner(logged).is_alive()


def test_an_owner_in_a_container_with_the_name_of_its_host(logged: RunFolder) -> None:
    """Catches logs that are followed forever because the host has a process with the id of a run in a container."""
    owner = Owner(logged)
    with lock_run(logged):
        assert json.loads(logged.owner.read_text())["pid_namespace"] == str(Path("/proc/self/ns/pid").readlink())
        record = {**this_machine(), "pid": os.getpid(), "pid_namespace": "pid:[1]"}
        logged.owner.write_text(json.dumps(record))
        assert owner.is_alive()
    logged.owner.write_text(json.dumps(record))
    assert not owner.is_alive()


def test_an_owner_on_another_machine_that_is_silent(logged: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches logs that are followed for hours, silently, after the launch was killed or its host has died."""
    logged.owner.write_text(json.dumps({"host": "elsewhere", "boot": "1", "pid": os.getpid()}))
    owner = Owner(logged, LockTimes(dead=0.0))
    for seconds in (1, 2):
        os.utime(logged.owner, (seconds, seconds))
        assert owner.is_alive()
        assert capsys.readouterr().err == ""
        assert owner.is_alive()
        assert "warning: elsewhere has not renewed logs/launch.owner for 0 s: the run, " in capsys.readouterr().err
        assert owner.is_alive()
        assert capsys.readouterr().err == ""


def test_an_owner_that_has_ended(logged: RunFolder) -> None:
    """Catches logs that are followed forever after a launch was killed, also if another program has its process id."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        logged.owner.write_text(json.dumps({**this_machine(), "pid": process.pid}))
        owner = Owner(logged)
        renewed = logged.owner.stat().st_mtime
        os.utime(logged.owner, (0, renewed - 3600))
        assert not owner.is_alive(), "the process is younger"
        os.utime(logged.owner, (0, renewed))
        assert owner.is_alive()
    assert not owner.is_alive()
