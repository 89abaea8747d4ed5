import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import LIMIT

REPOSITORY = Path(__file__).parents[3]
CODE = """
import atexit, launcher.__main__, launcher.cli
def main(): {body}
launcher.cli.main = main
atexit.register(print, "ended")
class Kept:
    def __del__(self): print("taken apart")
kept = Kept()
launcher.__main__.run()
"""


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("return 0", 0, ""),
        ("return 75", 75, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('failed')", 1, "failed\n"),
    ],
)
def test_the_command_ends_at_once_with_its_exit_code(body: str, code: int, error: str) -> None:
    """Catches a second spent on taking apart what was imported, lost output and exit codes, skipped exit handlers."""
    done = subprocess.run([sys.executable, "-c", CODE.format(body=body)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "ended\n", error)


@pytest.mark.parametrize(
    ("given", "order"), [({}, "PCI_BUS_ID"), ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "FASTEST_FIRST")]
)
def test_gpus_have_the_numbers_of_nvidia_smi(given: dict[str, str], order: str) -> None:
    """Catches CUDA_VISIBLE_DEVICES=1 that means another GPU for `finetune` than for the ranks of `pretrain`."""
    code = CODE.format(body="import os; print(os.environ['CUDA_DEVICE_ORDER']); return 0")
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout == f"{order}\nended\n"


SIGNALED = """
import signal, sys
class Signal:
    def find_spec(name, *_):
        if name == "launcher.cli": signal.raise_signal(signal.{number})
sys.meta_path.insert(0, Signal)
sys.argv = ["deepcloze", "pretrain", "--config=none.yaml"]
import launcher.__main__
launcher.__main__.run()
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_while_the_command_starts_stops_it(number: str) -> None:
    """Catches another exit code than 75 because the modules of the command line are still being imported."""
    done = subprocess.run([sys.executable, "-c", SIGNALED.format(number=number)], capture_output=True, text=True)
    expected = "deepcloze: interrupted; run the same command again to resume\n"
    assert (done.returncode, done.stderr) == (75, expected)


def test_python_m_deepcloze_is_the_command(tmp_path: Path) -> None:
    """Catches commands that do nothing and end with exit code 0."""
    command = [sys.executable, "-m", "deepcloze", "logs", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    assert str(tmp_path / "run") in done.stderr


def test_closed_streams(tmp_path: Path) -> None:
    """Catches a command that fails at its end, or before it begins, because the shell has closed a stream."""
    codes = {}
    for closed in ("", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        command = f"{sys.executable} -m launcher status {tmp_path} {closed}"
        codes[closed] = subprocess.run(command, shell=True, cwd=REPOSITORY, timeout=LIMIT, check=False).returncode
    assert set(codes.values()) == {codes[""]}, codes


STARTING = """
import subprocess, sys
from launcher.__main__ import _open_closed_streams
_open_closed_streams()
sys.exit(subprocess.call([sys.executable, "-c", "import os; [os.fstat(number) for number in range(3)]"]))
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_processes_of_a_command_have_no_closed_streams(closed: str) -> None:
    """Catches ranks that end with a traceback, or whose files take the number of stdout and get its text."""
    command = [sys.executable, "-c", STARTING]
    assert subprocess.run(f"{shlex.join(command)} {closed}", shell=True, cwd=REPOSITORY, check=False).returncode == 0


def test_a_locale_that_lacks_characters() -> None:
    """Catches a traceback in place of the help, such as with LANG=en_US, which means ISO 8859-1."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "launcher", "--help"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=REPOSITORY, check=True)
    assert done.stdout.startswith(b"usage: deepcloze COMMAND [--flag=value ?]")


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Catches the complaints of matplotlib, which uses a temporary folder instead, around the result of a report."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    unset = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": "/proc/none"}
    command = [sys.executable, "-m", "launcher", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path}/report/index.html\n", "")
    assert list((tmp_path / "report").glob("*.png"))
