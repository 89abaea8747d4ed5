"""A run in a terminal."""

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from launches import LONG, SLOW_STEPS, config_file, patched, wait_for_steps
from waiting import LIMIT

SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}


class Terminal:
    """A pseudo-terminal in which a command runs."""

    def __init__(self, command: list[str], folder: Path, variables: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | SETTINGS | variables,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)  # a full terminal would block the command
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: no process has it open any more
            while new := os.read(self._ours, 1 << 16):
                self._shown += new

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read(self) -> str:
        """All that it shows until the command ends."""
        self.process.wait(timeout=LIMIT)
        self._reader.join(timeout=LIMIT)
        return self._shown.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self._ours)


def visible(shown: str) -> list[str]:
    """The lines that remain on the terminal, after those that the progress bar has erased."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9?;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return lines


@pytest.fixture
def terminal(tmp_path: Path, wordpiece_corpus: Path, handed_over: Mapping[str, str]) -> Iterator[Terminal]:
    """One with a long pretraining."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG)
    command = [sys.executable, "-m", "launcher", "pretrain", "--config", str(config)]
    opened = Terminal(command, tmp_path, {**handed_over, **patched(tmp_path, SLOW_STEPS)})
    yield opened
    opened.close()


def test_ctrl_c_saves_and_says_so(terminal: Terminal, tmp_path: Path) -> None:
    """Catches messages glued to the progress bar or ^C, or erased by the bar, a missing step, and a hidden cursor."""
    wait_for_steps(tmp_path / "run", 3, terminal.process)
    terminal.type("\x03")
    shown = terminal.read()
    assert terminal.process.returncode == 75, shown
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    lines = shown.replace("\r\n", "\n")
    said = lines.partition("^C")[
        2
    ]  # the bar may be drawn between ^C, which the terminal shows at once, and the message
    message = "created STOP: ranks that train save a checkpoint, and exit; press Ctrl-C again to kill them"
    assert f"\ndeepcloze: stopping: {message}\n\n" in said
    assert any(line.startswith("deepcloze: stopping: ") for line in visible(shown)), visible(shown)
    *_, saved, stopped = lines.rstrip("\n").split("\n")
    assert saved == f"deepcloze: stopped at step {checkpoint_step(checkpoint)}, saved"
    assert re.fullmatch("deepcloze: stopped: .*; run the same command again to resume", stopped)
    assert lines.rindex("\x1b[?25h") > lines.rindex("\x1b[?25l")
