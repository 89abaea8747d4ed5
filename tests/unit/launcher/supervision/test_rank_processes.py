import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder, open_run_folder
from launcher.ranks.start_command import Command
from launcher.supervision.attempt import Launch
from launcher.supervision.rank_processes import held_ranks
from launcher.supervision.supervisor import supervise
from waiting import wait_until

ROOT = Path(__file__).parents[4]

# Stands for DeepSpeed's launcher and a rank, which is a child of it.
RANK = """
import os, sys, time
from pathlib import Path
from experiment.goodput import attempt_start
from experiment.outcome_file import Cause, Outcome, write_outcome
from experiment.run_folder import RunFolder
from pretrain.rank_process import wait_at_gate
folder = Path({folder!r})
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
(folder / "pid").write_text(str(os.getpid()))
(folder / "imported").touch()
wait_at_gate()
(folder / "began").write_text(repr(attempt_start()))
{body}
"""

# Stands for `deepcloze`.
LAUNCHER = """
import os, sys, time
from launcher.ranks.start_command import Command
from launcher.supervision.rank_processes import held_ranks
with held_ranks(Command(tuple(sys.argv[1:]), os.environ), 1.0):
    time.sleep(3600)
"""


def rank(folder: Path, body: str = "") -> Command:
    argv = (sys.executable, "-c", RANK.format(folder=str(folder), body=body))
    return Command(argv, os.environ | {"PYTHONPATH": str(ROOT)})


def has_ended(folder: Path) -> bool:
    try:
        process = psutil.Process(int((folder / "pid").read_text()))
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_held_ranks_import_and_wait(tmp_path: Path) -> None:
    """Catches ranks that begin a run which is still being checked, and ones that never begin."""
    with held_ranks(rank(tmp_path), 1.0) as ranks:
        wait_until((tmp_path / "imported").exists)
        time.sleep(0.2)  # a rank that does not wait would begin in it
        assert not (tmp_path / "began").exists()
        with ranks.begin() as process:
            assert process.wait() == 0
    assert float((tmp_path / "began").read_text()) == 1.0


def test_ranks_of_a_refused_launch_are_killed(tmp_path: Path) -> None:
    """Catches processes and files that a mistake in the config leaves."""
    folders = set(Path(tempfile.gettempdir()).glob("deepcloze-launch-*"))
    with held_ranks(rank(tmp_path), 1.0):
        wait_until((tmp_path / "imported").exists)
    wait_until(lambda: has_ended(tmp_path))
    assert not (tmp_path / "began").exists()
    assert set(Path(tempfile.gettempdir()).glob("deepcloze-launch-*")) <= folders


def test_held_ranks_do_not_outlive_the_launcher(tmp_path: Path) -> None:
    """Catches ranks that wait forever for a launcher that was killed."""
    command = rank(tmp_path)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *command.argv], env=command.environment)
    wait_until((tmp_path / "imported").exists, launcher)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: has_ended(tmp_path))


def test_a_restart_starts_ranks_of_its_own(tmp_path: Path) -> None:
    """Catches a second attempt that waits for the ranks of the first one, and ranks that take part in two."""
    folder: RunFolder = open_run_folder(tmp_path / "run")
    body = "write_outcome(RunFolder(folder / 'run'), Outcome.{}, 'lost a rank', Cause.LOST_RANK)"
    launch = Launch(folder, {"localhost": (0,)}, lambda *_: rank(tmp_path, body.format("DONE")), max_restarts=1)
    with held_ranks(rank(tmp_path, body.format("FAILED")), 1.0) as ranks:
        result = supervise(launch, time.time(), first_start=1.0, held=ranks)
    assert result.outcome is Outcome.DONE
    assert len(folder.launches.read_text().splitlines()) == 2
    assert float((tmp_path / "began").read_text()) > 1.0
