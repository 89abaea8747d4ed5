import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import signal, time
from experiment.process import signals

signals._IMPORT_SECONDS, signals._AGAIN_SECONDS = {limit}, 0.001
try:
    with signals.handle_stop_signals(signals.interrupt):
        {body}
        for _ in range(600):
            time.sleep(0.1)
        print("lost")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
LIBRARY = """
try:
    import library_part
except BaseException as error:
    print("swallowed", type(error).__name__)
print("library imported")
"""
PART = """
import signal, time
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGINT)
time.sleep(0.02)  # the signal is sent again meanwhile
print("part imported")
"""


def output_of(folder: Path, argv: list[str], body: str, limit: float = 600) -> list[str]:
    files = {"script": SCRIPT.format(body=body, limit=limit), "library": LIBRARY, "library_part": PART}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_signal_waits_for_the_end_of_imports(tmp_path: Path) -> None:
    """Catches a KeyboardInterrupt that is raised inside an import, where a library catches it: the command fails with
    a traceback, or continues. And a signal that is lost in an import of some length."""
    assert output_of(tmp_path, ["script.py"], "import library") == ["part imported", "library imported", "interrupted"]


def test_a_hanging_import_is_interrupted(tmp_path: Path) -> None:
    """Catches a command that only SIGKILL can end."""
    seen = output_of(tmp_path, ["script.py"], "import library_part", limit=0)
    assert seen == ["interrupted"]


@pytest.mark.parametrize("body", ["signal.raise_signal(signal.SIGTERM); print('continues')", "import library"])
def test_a_script_that_is_imported_can_be_interrupted(tmp_path: Path, body: str) -> None:
    """Catches signals that are delayed forever, because the whole script runs inside an import."""
    assert output_of(tmp_path, ["-c", "import script"], body)[-1] == "interrupted"
