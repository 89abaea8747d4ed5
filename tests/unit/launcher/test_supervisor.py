import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from launcher.supervisor import Ending, run_attempt

ROOT = Path(__file__).parents[3]
SLOTS = {"localhost": (0, 2)}

# Stands for deepspeed and its ranks: {body} is what a rank does.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from experiment.run_folder import Outcome, RunFolder
folder = RunFolder(Path({path!r}))
{body}
"""

# What `deepcloze` does, as a process of its own that signals can be sent to.
LAUNCHER = """
import os, sys
from pathlib import Path
from experiment.run_folder import RunFolder
from launcher.supervisor import run_attempt
ending = run_attempt(RunFolder(Path(sys.argv[1])), sys.argv[2:], os.environ, {"localhost": (0,)})
print(ending.message)
sys.exit(ending.outcome.exit_code)
"""

# A grandchild that ignores signals, as a rank below deepspeed might; its pid goes to RUN/pid.
STUBBORN = """
import subprocess
ignoring = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(60)"
rank = subprocess.Popen([sys.executable, "-c", ignoring])
(folder.path / "pid").write_text(str(rank.pid))
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def rank(folder: RunFolder, body: str) -> list[str]:
    return [sys.executable, "-c", CHILD.format(path=str(folder.path), body=body)]


def attempt(folder: RunFolder, body: str) -> Ending:
    return run_attempt(folder, rank(folder, body), os.environ | {"PYTHONPATH": str(ROOT)}, SLOTS)


def start(folder: RunFolder, body: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A launcher in the background, once its rank is at work."""
    process = subprocess.Popen(
        [
            *prefix,
            sys.executable,
            "-c",
            LAUNCHER,
            str(folder.path),
            *rank(folder, body + "\n(folder.path / 'ready').touch()\n" + WAIT),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until((folder.path / "ready").exists)
    return process


WAIT = """
while not folder.stop.exists():
    time.sleep(0.01)
time.sleep(0.3)  # saving
folder.write_outcome(Outcome.STOPPED, "saved step 7")
"""
WAIT_FOR_EVER = "(folder.path / 'ready').touch()\ntime.sleep(60)"


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def launches(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.launches.read_text().splitlines()]


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("code", [0, 1])
def test_what_the_ranks_wrote_is_the_outcome(folder: RunFolder, outcome: Outcome, code: int):
    """Catches the exit code of DeepSpeed's launcher, which is always 0 or 1, being taken for the outcome."""
    ending = attempt(folder, f"folder.write_outcome(Outcome({outcome.value!r}), 'because'); sys.exit({code})")
    assert ending == Ending(outcome, "because")


def test_an_outcome_of_an_earlier_attempt_does_not_count(folder: RunFolder):
    """Catches a crashed attempt that is reported as the success before it."""
    folder.write_outcome(Outcome.DONE)
    assert attempt(folder, "sys.exit(0)").outcome is Outcome.FAILED


def test_each_attempt_leaves_one_line(folder: RunFolder):
    """Catches an attempt that overwrites another or is not kept."""
    attempt(folder, "folder.write_outcome(Outcome.STOPPED)")
    attempt(folder, "sys.exit(3)")
    first, second = launches(folder)
    assert (first["attempt"], first["outcome"], first["exit"], first["hosts"]) == (
        1,
        "stopped",
        75,
        {"localhost": [0, 2]},
    )
    assert (second["attempt"], second["outcome"], second["exit"]) == (2, "failed", 1)
    assert first["argv"] == rank(folder, "folder.write_outcome(Outcome.STOPPED)")
    assert first["time"] <= second["time"]


def test_a_silent_death_shows_the_log_of_the_rank_that_failed(folder: RunFolder):
    """Catches a failure without a trail, and one blamed on a rank that only lost its peer, or on an earlier attempt."""
    folder.rank_log(9).write_text("Traceback: long ago")
    os.utime(folder.rank_log(9), (0, 0))
    ending = attempt(
        folder,
        "folder.rank_log(1).write_text('step 1\\nTraceback\\nout of paper')\n"
        "time.sleep(0.05)\n"
        "folder.rank_log(0).write_text('Traceback\\nconnection closed by peer')\n"
        "sys.exit(1)",
    )
    assert ending.outcome is Outcome.FAILED
    assert f"exit code 1); their logs are in {folder.logs}" in ending.message
    assert ending.message.endswith("the end of rank-1.log:\nstep 1\nTraceback\nout of paper")


def test_a_rank_killed_by_the_system_is_told_as_such(folder: RunFolder):
    """Catches 'exit code 247' where memory ran out: so DeepSpeed's launcher reports a SIGKILL."""
    killed = "killed by SIGKILL, as the system does when memory runs out"
    assert killed in attempt(folder, "sys.exit(-9)").message
    orphaned = attempt(folder, "folder.write_outcome(Outcome.FAILED, 'rank 0: lost rank 1'); sys.exit(-9)")
    assert orphaned.message == f"a rank was {killed}; rank 0: lost rank 1"


def test_a_stop_file_from_before_does_not_end_the_run(folder: RunFolder, capsys: pytest.CaptureFixture[str]):
    """Catches a run that cannot be resumed because the STOP that ended it is still there."""
    folder.stop.touch()
    body = "folder.write_outcome(Outcome.STOPPED if folder.stop.exists() else Outcome.DONE)"
    assert attempt(folder, body).outcome is Outcome.DONE
    assert "removed" in capsys.readouterr().err


def test_a_stop_file_of_the_users_stays(folder: RunFolder):
    """Catches the launcher taking away a STOP it has not made before the ranks have seen it."""
    attempt(folder, "folder.stop.touch()")
    assert folder.stop.exists()


def test_one_launch_at_a_time(folder: RunFolder):
    """Catches two launches writing the same run."""
    process = start(folder, "")
    with pytest.raises(UserError, match="another deepcloze is at work"):
        attempt(folder, "")
    process.terminate()
    process.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save(folder: RunFolder, number: signal.Signals):
    """Catches a signal that kills the ranks before they have saved; some senders repeat it at once."""
    process = start(folder, "")
    process.send_signal(number)
    until(folder.stop.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out.strip()) == (75, "saved step 7")
    assert "stopping: the ranks save a checkpoint" in err
    assert not folder.stop.exists()
    assert launches(folder)[0]["exit"] == 75


def test_nohup_lets_a_run_outlive_its_terminal(folder: RunFolder):
    """Catches `nohup deepcloze …` stopping at logout."""
    process = start(folder, "", prefix=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert not folder.stop.exists()
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 75


def test_a_second_interrupt_ends_ranks_that_do_not_listen(folder: RunFolder):
    """Catches a hung run that only SIGKILL ends, and ranks that survive it."""
    process = start(folder, STUBBORN + WAIT_FOR_EVER)
    process.send_signal(signal.SIGINT)
    until(folder.stop.exists)
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    assert "last complete checkpoint" in out
    assert not folder.stop.exists()
    until(lambda: gone(int((folder.path / "pid").read_text())))


def test_no_rank_outlives_a_killed_launcher(folder: RunFolder):
    """Catches ranks that go on writing a run which the user has started anew."""
    process = start(folder, STUBBORN + WAIT_FOR_EVER)
    process.kill()
    process.communicate(timeout=10)
    until(lambda: gone(int((folder.path / "pid").read_text())))
    assert launches(folder)[0]["outcome"] is None


def test_ranks_that_outlive_deepspeed_may_finish(folder: RunFolder):
    """Catches ranks that are killed while they save, when a signal has ended DeepSpeed's launcher before them."""
    saving = "import time; time.sleep(0.5); open({!r}, 'w').close()".format(str(folder.path / "saved"))
    attempt(folder, f"import subprocess; subprocess.Popen([sys.executable, '-c', {saving!r}])")
    assert (folder.path / "saved").exists()
