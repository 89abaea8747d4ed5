import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files import checkpoints
from experiment.run_files.outcome_file import Cause, Outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.tracking.config import AlertsConfig, TrackingConfig
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.supervision import attempt as attempt_module
from launcher.supervision import launch_result, rank_processes, restarts
from launcher.supervision.attempt import LaunchSettings
from launcher.supervision.launch_result import LaunchResult
from launcher.supervision.stop_signals import StopSignals
from launcher.supervision.supervisor import remove_launch_leftovers, supervise
from runs import sampled, soak
from small_disk import SmallDisk
from waiting import wait_until
from webhook_server import webhook

ROOT = Path(__file__).parents[4]
SLOTS = {"localhost": (0, 2)}

# Stands for deepspeed and its ranks: {body} is what a rank does.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from experiment.run_files.outcome_file import Cause, Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder
folder = RunFolder(Path({path!r}))
{body}
"""

# Stands for `deepcloze`, as a separate process that can receive signals.
LAUNCHER = """
import os, sys, time
from pathlib import Path
from experiment.process import signals
from experiment.run_files.run_folder import RunFolder
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.supervision.attempt import LaunchSettings
from launcher.supervision.supervisor import supervise
signals.REPEATED_SECONDS = float(os.environ["REPEATED_SIGNAL_SECONDS"])
command = DeepSpeedCommand(tuple(sys.argv[2:]), os.environ)
launch = LaunchSettings(RunFolder(Path(sys.argv[1])), {"localhost": (0,)}, lambda *_: command)
result = supervise(launch)
print(result.message)
sys.exit(result.outcome.exit_code)
"""

# A grandchild that ignores signals, as a rank started by deepspeed might; its pid is written to RUN/pid.
STUBBORN = """
import subprocess
ignoring = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(3600)"
rank = subprocess.Popen([sys.executable, "-c", ignoring])
(folder.path / "pid").write_text(str(rank.pid))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = open_run_folder(tmp_path / "run")
    yield folder
    if (folder.path / "pid").exists():
        with suppress(ProcessLookupError):
            os.kill(int((folder.path / "pid").read_text()), signal.SIGKILL)


def rank(folder: RunFolder, body: str) -> list[str]:
    return [sys.executable, "-c", CHILD.format(path=str(folder.path), body=body)]


def attempt(folder: RunFolder, body: str) -> LaunchResult:
    return supervise(one_launch(folder, body))


def one_launch(folder: RunFolder, body: str, path: str = str(ROOT)) -> LaunchSettings:
    command = DeepSpeedCommand(tuple(rank(folder, body)), os.environ | {"PYTHONPATH": path})
    return LaunchSettings(folder, SLOTS, lambda *_: command)


def start(
    folder: RunFolder, body: str, prefix: tuple[str, ...] = (), repeated_signal_seconds: float = 1.0
) -> subprocess.Popen[str]:
    """A launcher in the background whose rank has started."""
    process = subprocess.Popen(
        [
            *prefix,
            sys.executable,
            "-c",
            LAUNCHER,
            str(folder.path),
            *rank(folder, body + "\n(folder.path / 'ready').touch()\n" + WAIT),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "REPEATED_SIGNAL_SECONDS": str(repeated_signal_seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((folder.path / "ready").exists, process)
    return process


WAIT = """
while not folder.stop.exists():
    time.sleep(0.01)
time.sleep(0.3)  # saving
write_outcome(folder, Outcome.STOPPED, "saved step 7")
"""
HANG = "(folder.path / 'ready').touch()\ntime.sleep(3600)"


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def launches(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.launches.read_text().splitlines()]


@pytest.mark.parametrize(
    ("outcome", "code"),
    sampled(
        [(outcome, code) for outcome in Outcome for code in (0, 1)],
        [(outcome, int(outcome is Outcome.DONE)) for outcome in Outcome],  # the code that would mislead
    ),
)
def test_what_the_ranks_wrote_is_the_outcome(folder: RunFolder, outcome: Outcome, code: int):
    """Catches the exit code of DeepSpeed's launcher, which may be 0 or 1 for any outcome, being taken for it."""
    result = attempt(folder, f"write_outcome(folder, Outcome({outcome.value!r}), 'because'); sys.exit({code})")
    assert result == LaunchResult(outcome, "because")


def test_a_run_ends_when_its_ranks_have(folder: RunFolder):
    """Catches a launch that waits for DeepSpeed's launcher, which takes a second to exit; here it never does."""
    body = (
        "import subprocess\n"
        "from experiment.run_files.outcome_file import RankRecord\n"
        "rank = subprocess.Popen([sys.executable, '-c', ''])\n"
        "rank.wait()\n"
        "RankRecord(0, 'localhost', rank.pid, exit=0).write(folder)\n"
        "write_outcome(folder, Outcome.DONE)\n"
        "time.sleep(3600)"
    )
    launch = replace(one_launch(folder, body), slots={"localhost": (0,)})
    assert supervise(launch) == LaunchResult(Outcome.DONE, "")


def test_each_launch_adds_one_line(folder: RunFolder):
    """Catches a launch that is not recorded or overwrites the record of another."""
    attempt(folder, "write_outcome(folder, Outcome.STOPPED)")
    attempt(folder, "sys.exit(3)")
    first, second = launches(folder)
    assert (first["attempt"], first["outcome"], first["exit"], first["hosts"]) == (
        1,
        "stopped",
        75,
        {"localhost": [0, 2]},
    )
    assert (second["attempt"], second["outcome"], second["exit"]) == (2, "failed", 1)
    assert first["argv"] == rank(folder, "write_outcome(folder, Outcome.STOPPED)")
    assert first["time"] <= second["time"]


def test_a_failure_without_outcome_shows_the_log_of_the_failed_rank(folder: RunFolder):
    """Catches a failure without a hint, and one blamed on a rank that only lost its peer or on an earlier launch."""
    folder.rank_log(9).write_text("Traceback: long ago")
    os.utime(folder.rank_log(9), (0, 0))
    result = attempt(
        folder,
        "folder.rank_log(1).write_text('step 1\\nTraceback\\nout of paper')\n"
        "time.sleep(0.05)\n"
        "folder.rank_log(0).write_text('Traceback\\nconnection closed by peer')\n"
        "sys.exit(1)",
    )
    assert result.outcome is Outcome.FAILED
    assert f"exit code 1); their logs are in {folder.logs}" in result.message
    assert result.message.endswith("the end of rank-1.log:\nstep 1\nTraceback\nout of paper")


def test_the_log_of_a_failed_rank_on_a_disk_whose_clock_is_behind(folder: RunFolder) -> None:
    """Catches a failure without its traceback, and lines of an earlier attempt."""
    folder.rank_log(0).write_text("Traceback\nearlier\n")
    result = attempt(
        folder,
        "log = folder.rank_log(0)\n"
        "with log.open('a') as file: file.write('Traceback\\nout of paper\\n')\n"
        "os.utime(log, (0, time.time() - 60))\n"
        "sys.exit(1)",
    )
    assert result.message.endswith("\nthe end of rank-0.log:\nTraceback\nout of paper")


def test_a_rank_killed_by_the_system_is_reported(folder: RunFolder):
    """Catches a bare 'exit code 247', which is how DeepSpeed's launcher reports a SIGKILL, when memory ran out."""
    killed = "killed by SIGKILL, possibly because the system ran out of memory"
    assert killed in attempt(folder, "sys.exit(-9)").message
    orphaned = attempt(folder, "write_outcome(folder, Outcome.FAILED, 'rank 0: lost rank 1'); sys.exit(-9)")
    assert orphaned.message == f"a rank was {killed}; rank 0: lost rank 1"


# Stands for DeepSpeed's launcher of six ranks in a collective on GPUs. It waits until all have ended.
IN_A_COLLECTIVE = """
import subprocess
from experiment.run_files.outcome_file import RankRecord
waiting = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
ranks = [subprocess.Popen([sys.executable, "-c", waiting]) for _ in range(6)]
for number, rank in enumerate(ranks):
    RankRecord(number, "localhost", rank.pid, training=True).write(folder)
    folder.rank_log(number).write_text("log of rank " + str(number))
{failure}
for rank in ranks:
    rank.wait()
sys.exit({exit_code})
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_one_of_many_ranks_fails_while_the_others_wait(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    """Catches a launch that waits 30 s for each rank that hangs in a collective, a killed rank that is not named, and a
    message that names all ranks that the launcher has killed."""
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(attempt_module, "_EXIT_POLL_SECONDS", 0.05)
    failure = (
        "ranks[3].kill()"
        if is_killed
        else "write_outcome(folder, Outcome.FAILED, 'host, rank 3: KeyError', Cause.ERROR); ranks[3].kill(); "
        "RankRecord(3, 'localhost', ranks[3].pid, exit=1).write(folder)"
    )
    result = attempt(folder, IN_A_COLLECTIVE.format(failure=failure, exit_code=-9 if is_killed else 1))
    if is_killed:
        assert re.search(r"\(rank 3 on localhost \(process \d+\) was killed by SIGKILL, possibly", result.message)
        assert result.message.endswith("the end of rank-3.log:\nlog of rank 3")
    else:
        assert result == LaunchResult(Outcome.FAILED, "host, rank 3: KeyError", Cause.ERROR)


def test_ranks_end_with_the_launcher_of_deepspeed(folder: RunFolder):
    """Catches ranks that train on without their launcher, and one that is named as the killed process."""
    record = "from experiment.run_files.outcome_file import RankRecord; RankRecord(0, 'host', rank.pid).write(folder)"
    start = time.monotonic()
    result = attempt(folder, f"{STUBBORN}{record}; os.kill(os.getpid(), signal.SIGKILL)")
    assert time.monotonic() - start < attempt_module.EXIT_TIMEOUT_SECONDS
    assert "(DeepSpeed's launcher was killed by SIGKILL, possibly because the system" in result.message


def test_a_stop_file_created_while_the_launch_is_checked_stops_it(folder: RunFolder):
    """Catches a run that starts although the user has stopped it."""
    launched_at = time.time()
    folder.stop.touch()
    os.utime(folder.stop, (launched_at + 1, launched_at + 1))
    result = supervise(replace(one_launch(folder, "(folder.path / 'started').touch()"), checked_at=launched_at))
    assert result.outcome is Outcome.STOPPED
    assert str(folder.stop) in result.message
    assert not (folder.path / "started").exists()
    assert launches(folder)[0]["outcome"] == "stopped"


def test_a_stop_file_older_than_the_launch_but_not_its_process_is_removed(folder: RunFolder) -> None:
    """Catches `sh -c 'prepare && exec deepcloze pretrain'` that stops at once because of a STOP file created while the
    shell prepared the launch."""
    began = time.time() - 100
    folder.stop.touch()
    os.utime(folder.stop, (began + 50, began + 50))
    launch = replace(one_launch(folder, "write_outcome(folder, Outcome.DONE)"), start_time=began)
    assert supervise(launch).outcome is Outcome.DONE
    assert datetime.fromisoformat(launches(folder)[0]["time"]).timestamp() == int(began)


@pytest.mark.parametrize("days", [-365, 1])
def test_an_old_stop_file_does_not_stop_the_run(folder: RunFolder, capsys: pytest.CaptureFixture[str], days: int):
    """Catches a run that cannot resume because the STOP file that ended it still exists, also if a clock was wrong."""
    folder.stop.touch()
    date = time.time() + days * 86400
    os.utime(folder.stop, (date, date))
    body = "write_outcome(folder, Outcome.STOPPED if folder.stop.exists() else Outcome.DONE)"
    assert attempt(folder, body).outcome is Outcome.DONE
    assert "removed" in capsys.readouterr().err


def test_trials_of_a_killed_launcher_are_removed(folder: RunFolder) -> None:
    """Catches the logs and configs of --autotune that stay in the run folder, and files that it was writing."""
    (folder.trials / "130").mkdir(parents=True)
    gone, here = 2**22 + 1, f".{platform.node()}"  # the kernel's thread ids are at most 2^22
    written = [path.with_name(f".{path.name}{here}.{gone}") for path in (folder.launches, folder.rank_record(0))]
    of_others = [folder.path / f".config.yaml.another-host.{gone}", folder.path / f".config.yaml{here}.{os.getpid()}"]
    for path in (*written, *of_others):
        path.touch()
    attempt(folder, "write_outcome(folder, Outcome.DONE)")
    assert not folder.trials.exists()
    assert [path.exists() for path in (*written, *of_others)] == [False, False, True, True]


def test_a_stop_file_created_by_the_user_is_kept(folder: RunFolder):
    """Catches the launcher removing a STOP file it did not create, before the ranks have seen it."""
    attempt(folder, "folder.stop.touch()")
    assert folder.stop.exists()


FAILS_ONCE = (
    "first = not (folder.path / 'second').exists(); (folder.path / 'second').touch()\n"
    "write_outcome(folder, Outcome.FAILED if first else Outcome.DONE, 'lost a rank', Cause.LOST_RANK)"
)


def test_a_launch_is_restarted(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that stays down after a failure that does not happen again, or that hides it."""
    assert supervise(replace(one_launch(folder, FAILS_ONCE), max_restarts=1)).outcome is Outcome.DONE
    assert "lost a rank\nrestarting" in capsys.readouterr().err
    first, second = launches(folder)
    assert (first["outcome"], first["cause"], first["message"]) == ("failed", "lost_rank", "lost a rank")
    assert (second["attempt"], second["outcome"]) == (2, "done")


def test_failed_attempts_send_alerts(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is down while nobody knows, and a launcher that exits before its last alert is sent."""
    launch = replace(
        one_launch(folder, "write_outcome(folder, Outcome.FAILED, 'lost a rank', Cause.LOST_RANK)"),
        max_restarts=1,
        tracking=TrackingConfig(alerts=AlertsConfig(webhook=True)),
    )
    with webhook() as (url, received):
        monkeypatch.setenv("DEEPCLOZE_WEBHOOK_URL", url)
        supervise(launch)
    assert [alert["event"] for alert in received] == ["crash", "crash"]
    first, last = [alert["message"] for alert in received]
    assert first == "failed: lost a rank\nrestarting"
    assert last.endswith("not restarted: --max_restarts=1 within an hour\nthe launch has ended")


@pytest.mark.parametrize(("number", "answers"), [(signal.SIGTERM, True), (None, True), (signal.SIGTERM, False)])
def test_a_stop_between_restarts_ends_the_launch(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: signal.Signals | None, answers: bool
) -> None:
    """Catches a STOP file or signal that only ends one attempt, also if the disk does not answer, and a batch system
    that does not start the run again because a rank was lost at the same time."""
    if not answers:
        (folder.path / "second").touch()
        break_disk(monkeypatch, folder, Path, "iterdir")
    stop = "folder.stop.touch()" if number is None else f"os.kill(os.getppid(), {number}); time.sleep(1)"
    body = f"write_outcome(folder, Outcome.FAILED, 'lost a rank', Cause.LOST_RANK); {stop}"
    result = supervise(replace(one_launch(folder, body), max_restarts=5))
    assert len(launches(folder)) == 1
    assert result.outcome is Outcome.STOPPED
    assert result.message.startswith("lost a rank\nstopped")


def test_a_stop_file_ends_a_wait(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file that is noticed minutes later, at the next look at hosts that do not answer."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 3
        folder.stop.touch()

    monkeypatch.setattr(time, "sleep", sleep)
    StopSignals(folder).wait(3600.0)
    assert sum(slept) <= 1.0


@pytest.mark.parametrize(("begun", "outcome"), [(False, Outcome.STOPPED), (True, Outcome.FAILED)])
def test_a_signal_to_all_processes_stops_ranks_that_import(folder: RunFolder, begun: bool, outcome: Outcome) -> None:
    """Catches exit code 1 for a job that a batch system ends early, because DeepSpeed's launcher, which gets the signal
    too, exits with it; and one that hides the failure of a rank that saves."""
    record = "folder.rank_record(0).write_text('{}')" if begun else "pass"
    body = f"{record}; os.kill(os.getppid(), signal.SIGTERM); sys.exit(1)"
    assert attempt(folder, body).outcome is outcome


def break_disk(
    monkeypatch: pytest.MonkeyPatch, folder: RunFolder, owner: object, name: str, times: int = 1_000_000
) -> None:
    """Let a function fail so often on files of the run folder, from when RUN/second exists."""
    working, failures = getattr(owner, name), iter(range(times))

    def fail(where: Path | RunFolder, *arguments: object, **options: object) -> object:
        path = where.path if isinstance(where, RunFolder) else where
        is_of_run = path.is_relative_to(folder.path) and (folder.path / "second").exists()
        if is_of_run and next(failures, None) is not None:
            raise OSError(errno.EIO, "Input/output error", str(folder.path))
        return working(where, *arguments, **options)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (launch_result, "reserve_outcome"),
        (checkpoints, "complete_checkpoints"),
        (attempt_module, "read_result"),
        (Path, "iterdir"),
        (Path, "read_bytes"),  # launch.jsonl
    ],
)
def test_a_disk_that_fails_between_attempts_is_tried_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    """Catches a run that ends because the disk that made its ranks fail does not answer the launcher either: at the end
    of the first attempt, between two, or at the start of the second."""
    monkeypatch.setattr(restarts, "_FIRST_WAIT_SECONDS", 0.0)
    break_disk(monkeypatch, folder, owner, name, times=4)
    launch = replace(one_launch(folder, FAILS_ONCE), max_restarts=5)
    assert supervise(launch).outcome is Outcome.DONE


def test_an_attempt_whose_end_cannot_be_read_is_recorded(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches exit code 2, a mistake of the user, for a disk that fails while the ranks run; and a restart without
    a recorded reason."""
    break_disk(monkeypatch, folder, attempt_module, "read_result", times=1)
    result = attempt(folder, FAILS_ONCE)
    assert (result.outcome, result.cause) == (Outcome.FAILED, Cause.LOST_RANK)
    assert (launches(folder)[0]["outcome"], launches(folder)[0]["cause"]) == ("failed", "lost_rank")
    assert result.message == launches(folder)[0]["message"] == f"{folder.path}: Input/output error"


@pytest.mark.parametrize("times", [2, 1_000_000])  # 2: the disk answers again when the second attempt has ended
def test_checkpoints_that_cannot_be_listed_are_no_progress(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Catches restarts up to the limit after the same bug, because a disk error is taken for a new checkpoint."""
    checkpoint = folder.checkpoints / "step-00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    break_disk(monkeypatch, folder, checkpoints, "complete_checkpoints", times)
    body = "(folder.path / 'second').touch(); write_outcome(folder, Outcome.FAILED, 'KeyError', Cause.ERROR)"
    supervise(replace(one_launch(folder, body), max_restarts=5))
    assert len(launches(folder)) == 2


def test_one_launch_at_a_time(folder: RunFolder):
    """Catches two launches writing the same run."""
    process = start(folder, "")
    with pytest.raises(UserError, match="another deepcloze process is using"):
        attempt(folder, "")
    process.terminate()
    process.communicate()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, *soak(signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
)
def test_a_signal_lets_the_ranks_save(folder: RunFolder, number: signal.Signals):
    """Catches a signal that kills the ranks before they have saved; some senders repeat it at once."""
    process = start(folder, "", repeated_signal_seconds=600.0)  # a busy machine may delay the second one
    process.send_signal(number)
    wait_until(folder.stop.exists)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out.strip()) == (75, "saved step 7")
    assert "stopping: created STOP: ranks that train save a checkpoint" in err
    assert not folder.stop.exists()
    assert launches(folder)[0]["exit"] == 75


def test_a_run_under_nohup_outlives_its_terminal(folder: RunFolder):
    """Catches `nohup deepcloze …` stopping at logout."""
    process = start(folder, "", prefix=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert not folder.stop.exists()
    process.terminate()
    process.communicate()
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGINT, *soak(signal.SIGTERM, signal.SIGUSR1)])
def test_a_second_signal_kills_unresponsive_ranks(folder: RunFolder, number: signal.Signals):
    """Catches a hung run that only SIGKILL ends, and ranks that survive it."""
    process = start(folder, STUBBORN + HANG, repeated_signal_seconds=0.0)
    process.send_signal(number)
    wait_until(folder.stop.exists)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 75
    assert "last complete checkpoint" in out
    assert not folder.stop.exists()
    wait_until(lambda: gone(int((folder.path / "pid").read_text())))


def test_warnings_do_not_reach_deepspeeds_launcher(folder: RunFolder) -> None:
    """Catches ranks that are killed because a batch system warns all processes of a job, which ends pdsh and ssh."""
    process = start(folder, "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR2)")
    process.terminate()
    out, _ = process.communicate()
    assert (process.returncode, out.strip()) == (75, "saved step 7")


def test_no_rank_outlives_a_killed_launcher(folder: RunFolder):
    """Catches ranks that keep writing to a run that the user has restarted."""
    process = start(folder, STUBBORN + HANG)
    process.kill()
    process.communicate()
    wait_until(lambda: gone(int((folder.path / "pid").read_text())))
    assert launches(folder)[0]["outcome"] is None


def test_ranks_that_outlive_deepspeed_finish(folder: RunFolder):
    """Catches ranks killed while saving because a signal ended DeepSpeed's launcher first."""
    saving = "import time; time.sleep(0.5); open({!r}, 'w').close()".format(str(folder.path / "saved"))
    attempt(folder, f"import subprocess; subprocess.Popen([sys.executable, '-c', {saving!r}])")
    assert (folder.path / "saved").exists()


@pytest.mark.parametrize("torn", [b'{"attempt": 2, "ti', b'{"note": "\xc3', b"[1]\n", b"\x00\x00\n", b"9" * 10_000])
def test_a_torn_record_of_launches_is_repaired(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], torn: bytes
) -> None:
    """Catches a run that never starts again after a power cut, and a repair that loses whole lines or is silent."""
    attempt(folder, "write_outcome(folder, Outcome.STOPPED)")
    capsys.readouterr()
    folder.launches.write_bytes(folder.launches.read_bytes() + torn)
    assert attempt(folder, "write_outcome(folder, Outcome.DONE)").outcome is Outcome.DONE
    assert [launch["outcome"] for launch in launches(folder)] == ["stopped", "done"]
    assert "launch.jsonl is damaged: removed 1 of its 2 lines" in capsys.readouterr().err


def test_an_unreadable_record_of_launches_is_rejected(folder: RunFolder) -> None:
    """Catches a traceback."""
    folder.launches.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*launch\.jsonl: Is a directory"):
        attempt(folder, "")


def test_a_launch_on_a_full_disk_starts_no_rank(small_disk: SmallDisk) -> None:
    """Catches ranks that are started although nothing can be recorded, and an error that does not name the file."""
    folder = open_run_folder(small_disk.path / "run")
    small_disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:
        attempt(folder, "(folder.path / 'ready').touch()")
    assert str(folder.path) in caught.value.filename
    assert not (folder.path / "ready").exists()


def test_the_outcome_survives_a_disk_that_fills_up(small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a launch that ends with a traceback because its record cannot be written."""
    folder = open_run_folder(small_disk.path / "run")
    body = (
        "from small_disk import SmallDisk\n"
        f"SmallDisk(Path({str(small_disk.path)!r})).fill(new_files=False)\n"
        "write_outcome(folder, Outcome.STOPPED, 'saved step 7')"
    )
    result = supervise(one_launch(folder, body, path=f"{ROOT}:{ROOT / 'tests' / 'multiprocess'}"))
    assert result == LaunchResult(Outcome.STOPPED, "saved step 7")
    error = capsys.readouterr().err
    assert f"cannot record this launch: {folder.launches}: disk full" in error
    assert [launch["outcome"] for launch in launches(folder)] == [None], "complete, as it was at the start"


def test_a_signal_on_a_full_disk_ends_the_ranks(small_disk: SmallDisk) -> None:
    """Catches a launcher that dies in its signal handler because there is no room for a STOP file."""
    folder = open_run_folder(small_disk.path / "run")
    process = start(folder, STUBBORN + HANG)
    small_disk.fill(new_files=False)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "last complete checkpoint" in out
    assert f"killing the ranks: {folder.stop}: disk full" in error
    assert "Traceback" not in error
    wait_until(lambda: gone(int((folder.path / "pid").read_text())))


def test_a_signal_is_not_lost_if_the_stop_file_cannot_be_created(folder: RunFolder) -> None:
    """Catches ranks that are killed without a checkpoint because a disk did not answer, and a signal without effect."""
    folder.stop.symlink_to("nowhere/STOP")
    process = start(folder, "")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("deepcloze: cannot create STOP: ")
    folder.stop.unlink()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (75, "saved step 7")


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EROFS])
def test_a_signal_on_a_full_or_read_only_disk_while_the_ranks_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """Catches ranks that run on although they were to be killed, because their process was not yet known, and ones that
    wait for a disk that stays read-only: an error has remounted it."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start_and_signal(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    def refuse(path: Path) -> None:
        raise OSError(refusal, os.strerror(refusal), str(path))

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    monkeypatch.setattr(Path, "touch", refuse)
    assert attempt(folder, "time.sleep(60)").outcome is Outcome.STOPPED
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("skew", [-30, 30])
def test_a_stop_file_on_a_disk_with_another_clock(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    """Catches a run that starts although the user has stopped it, or stops at once because of an old STOP file, if the
    clock of the disk is behind or ahead."""
    clock_of_disk = time.time
    monkeypatch.setattr(time, "time", lambda: clock_of_disk() + skew)
    for age, is_kept in ((5, True), (15, False)):
        folder.stop.touch()
        os.utime(folder.stop, (0, clock_of_disk() - age))
        remove_launch_leftovers(folder, checked_at=time.time() - 10)
        assert folder.stop.exists() == is_kept


def test_a_stop_file_on_a_disk_that_does_not_date_folders(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file of this launch that is removed because a disk ignores the date given to a folder."""
    os.utime(folder.logs, (0, 0))
    folder.stop.touch()
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path, *times: None if Path(path).is_dir() else utime(path, *times))
    before = sorted(folder.logs.iterdir())
    remove_launch_leftovers(folder, checked_at=time.time() - 10)
    assert folder.stop.exists()
    assert sorted(folder.logs.iterdir()) == before


def test_a_launch_in_the_foreground_removes_the_output_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `deepcloze logs` that shows what an earlier launch printed, and a launch that removes its own output."""
    folder = open_run_folder(tmp_path / "run")
    folder.launch_output.write_text("earlier")
    mine = folder.launch_output.stat()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: mine)
        remove_launch_leftovers(folder, time.time())
    assert folder.launch_output.exists()
    remove_launch_leftovers(folder, time.time())
    assert not folder.launch_output.exists()
    remove_launch_leftovers(folder, time.time())
    assert list(folder.logs.iterdir()) == []
