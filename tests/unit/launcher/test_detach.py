import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from experiment.run_files.outcome_file import RankRecord
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import lock_run
from launcher import detach
from launcher.cli import main
from launcher.command_line import parse_command_line
from launcher.detach import background_command
from launcher.options import PretrainOptions

CONFIG = """
run: {dir: my-run}
model: {config: {model_type: bert}}
corpus: {train: corpus}
schedule: {steps: 10}
"""

# Stands for the launch in the background. It writes its process group to RUN/group.
TRAINS = """
import os, time
from pathlib import Path
from experiment.run_files.heartbeat import Heartbeat, write_heartbeat
from experiment.run_files.outcome_file import RankRecord
from experiment.run_files.run_folder import RunFolder
folder = RunFolder(Path("my-run"))
print("step 1", flush=True)
(folder.path / "group").write_text(str(os.getpgrp()))
write_heartbeat(folder, Heartbeat(0, "localhost", os.getpid(), 1, 0, "starting", False, 0.0))
RankRecord(0, "localhost", os.getpid(), training=True).write(folder)
time.sleep(3600)
"""
HAS_LOST_ITS_RECORD = TRAINS.replace("starting", "training").replace("training=True", "training=False")
FAILS = "import sys; sys.exit('deepcloze: the run failed: disk full')"
REFUSED = "import sys; print('deepcloze: no such corpus', file=sys.stderr); sys.exit(2)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    return RunFolder(tmp_path / "my-run")


@pytest.fixture(autouse=True)
def children() -> Iterator[None]:
    """Ends what a test has left in the background."""
    yield
    for child in psutil.Process().children():
        if "RankRecord" in " ".join(child.cmdline()):
            child.kill()
            child.wait()


def run_in_background(monkeypatch: pytest.MonkeyPatch, program: str) -> int:
    monkeypatch.setattr(detach, "background_command", lambda options: [sys.executable, "-c", program])
    try:
        return main(["pretrain", "--config=run.yaml", "--detach"])
    except SystemExit as ending:
        return int(ending.code or 0)


@pytest.mark.parametrize("program", [TRAINS, HAS_LOST_ITS_RECORD])
def test_a_run_is_left_in_the_background(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    """Catches a command that waits for the run, returns before it trains because of an earlier attempt that was killed,
    or leaves it in the session of the terminal."""
    open_run_folder(folder.path)
    RankRecord(0, "localhost", 1, training=True).write(folder)
    assert run_in_background(monkeypatch, program) == 0
    captured = capsys.readouterr()
    group = int((folder.path / "group").read_text())
    assert group != os.getpgrp()
    assert captured.out.splitlines() == [
        f"{folder.path}: runs in the background as process {group}",
        f"  follow it: deepcloze logs {folder.path} --follow",
        f"  stop it:   touch {folder.path}/STOP",
    ]
    assert captured.err == folder.launch_output.read_text() == "step 1\n"


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [(FAILS, 1, "disk full"), (REFUSED, 2, "no such corpus"), (KILLED, 1, "the launch was killed by SIGKILL")],
)
def test_a_launch_that_fails_tells_why(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    code: int,
    message: str,
) -> None:
    """Catches a failure that is only in a file, another exit code, and a folder that is left by a mistake."""
    assert run_in_background(monkeypatch, program) == code
    assert message in capsys.readouterr().err
    assert not folder.path.exists()


def test_what_an_earlier_launch_printed_is_not_repeated(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the failure of an earlier launch that is shown again, and a folder with a run that is removed."""
    open_run_folder(folder.path).launch_output.write_text("earlier\n")
    assert run_in_background(monkeypatch, FAILS) == 1
    assert "earlier" not in capsys.readouterr().err
    assert folder.launch_output.read_text().startswith("earlier\n")


def test_mistakes_start_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second launch that prints to the file of a run that is active, and a config that is checked late."""
    with lock_run(open_run_folder(folder.path)):
        assert run_in_background(monkeypatch, TRAINS) == 2
    assert "another deepcloze process is using" in capsys.readouterr().err
    assert not folder.launch_output.exists()
    moved = open_run_folder(Path("moved").absolute())
    moved.config.write_text(CONFIG.replace("my-run", "old-run"))
    moved.provenance.write_text("{}")
    assert main(["pretrain", f"--config={moved.config}", "--detach"]) == 2
    assert "--run.dir=" in capsys.readouterr().err
    assert not Path("old-run").exists()
    Path("run.yaml").write_text("run: {dir: other}\nmodle: {}\n")
    assert run_in_background(monkeypatch, TRAINS) == 2
    assert "unknown config key 'modle'" in capsys.readouterr().err
    assert not Path("other").exists()


def test_the_command_in_the_background_is_the_same() -> None:
    """Catches a flag or override that is lost, and a command that detaches forever."""
    overrides = {"optimizer.lr": "1e-4", "model.freeze": "[a, b]"}
    options = PretrainOptions(
        config="my run.yaml", detach=True, num_gpus=2, profile=True, max_restarts=3, overrides=overrides
    )
    argv = background_command(options)
    from launcher.commands import COMMANDS

    assert parse_command_line(argv[4:], COMMANDS) == ("pretrain", options.model_copy(update={"detach": False}))
