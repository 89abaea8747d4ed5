"""Runs in the background."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from experiment.run_files.checkpoints import complete_checkpoints
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from launches import LONG, SLOW_STEPS, Start, config_file, patched, wait_for_exit
from waiting import wait_until

DEEPCLOZE = str(Path(sys.executable).with_name("deepcloze"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """The run folder. A launch that still runs in the background afterwards is killed; its ranks end with it."""
    folder = RunFolder(tmp_path / "run")
    yield folder
    with suppress(OSError, ValueError):
        os.kill(json.loads(folder.owner.read_text())["pid"], signal.SIGKILL)


def test_a_run_survives_its_terminal_and_can_be_followed(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, folder: RunFolder
) -> None:
    """Catches a run that ends with the session that has started it, and a status or log that lacks it."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, checkpoint__every_steps=2)
    launch = start(DEEPCLOZE, "pretrain", "--config", str(config), "--detach", **patched(tmp_path, SLOW_STEPS))
    code, output = wait_for_exit(launch)
    assert code == 0, output
    with suppress(ProcessLookupError):  # it has no process left
        os.killpg(launch.pid, signal.SIGHUP)
    assert (found := re.search(r"runs in the background as process (\d+)", output)), output
    assert os.getsid(int(found[1])) == int(found[1])
    following = start(DEEPCLOZE, "logs", str(folder.path), "--follow")
    wait_until(lambda: b"step 4/5000" in folder.launch_output.read_bytes())
    wait_until(lambda: complete_checkpoints(folder.checkpoints))
    status = start(DEEPCLOZE, "status", str(folder.path), "--json")
    code, listed = wait_for_exit(status)
    assert code == 0, listed
    (shown,) = json.loads(listed)
    assert (shown["state"], shown["total_steps"], shown["attempts"]) == ("running", LONG, 1)
    assert shown["step"] >= 4
    assert shown["checkpoint_step"] >= 2
    folder.stop.touch()
    code, followed = wait_for_exit(following)
    assert code == 0, followed
    assert "step 4/5000" in followed
    assert "run the same command again to resume" in followed.splitlines()[-1]
    reported = read_outcome(folder)
    assert reported.outcome is Outcome.STOPPED
