import os
import subprocess
import sys

import pytest

from experiment.hardware import waiting_variables

CODE = """
import atexit, launcher.__main__
def main(): {body}
launcher.__main__.main = main
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


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "7"}])
def test_openmp_reads_how_threads_wait(chosen: dict[str, str]) -> None:
    """Catches a command that sets it after torch was imported, and the user's own setting overridden."""
    environ = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environ |= {**chosen, "OMP_DISPLAY_ENV": "verbose"}
    code = CODE.format(body="import torch; return 0")
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    count = (chosen or waiting_variables({}))["GOMP_SPINCOUNT"]
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
