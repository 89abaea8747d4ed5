import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import near_duplicates, serving
from benchmarks.measuring import PeakMemory, describe_machine, run_module, run_or_measure, stop_after
from experiment.run_files.run_folder import RunFolder

MEMORY = 400 * 2**20
FORKING = f"""
import os, sys
held = bytes(range(256)) * ({MEMORY} // 256)
if os.fork() == 0:
    print("holds it", flush=True)
sys.stdin.read()
"""
STARTING = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FORKING!r}])"


def test_processes_of_processes_count_and_shared_pages_only_once() -> None:
    """Catches the memory of ranks that is missed because a launcher started them, and pages counted twice after a
    fork."""
    with PeakMemory(seconds=3600) as memory:
        process = subprocess.Popen([sys.executable, "-c", STARTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        memory.sample()  # not by time, which may be just before and after the fork
        process.communicate()
    assert MEMORY < memory.bytes < 1.5 * MEMORY


def test_a_module_may_print_much(tmp_path: Path) -> None:
    """Catches a process that waits forever because nobody reads what it prints: a pipe holds 64 KiB."""
    (tmp_path / "loud.py").write_text("print('x' * 200_000); print(7)")
    assert run_module("loud", {}, environment={"PYTHONPATH": str(tmp_path)}) == 7


def test_a_module_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches an exit code without a reason."""
    (tmp_path / "failing.py").write_text("raise SystemExit('no such tokenizer')")
    with pytest.raises(subprocess.CalledProcessError):
        run_module("failing", {}, environment={"PYTHONPATH": str(tmp_path)})
    assert "no such tokenizer" in capfd.readouterr().err


def test_a_module_is_measured_or_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches settings of `run_module` that are read as arguments of the command line, or the other way round."""

    def command(name: str) -> None:
        print(f"table of {name}")

    for argument in ("a", '{"name": "a"}'):
        monkeypatch.setattr(sys, "argv", ["module", argument])
        run_or_measure(command, lambda name: {"of": name})
    assert capsys.readouterr().out.splitlines() == ["table of a", '{"of": "a"}']


def test_a_server_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a server that does not start, for a reason that nobody sees."""
    failing = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: start(failing, **given))
    with pytest.raises(RuntimeError, match="the server ended"), serving._server("model", 1, "fp32"):
        pass
    assert "no such model" in capsys.readouterr().err


def test_figures_have_their_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures that cannot be published, because nobody knows what they were measured on."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *_: start(["true"]))  # in place of `deepcloze clean`
    near_duplicates.near_duplicates(documents=100)
    assert capsys.readouterr().out.startswith(describe_machine())


def test_a_run_is_stopped_once_it_trains(tmp_path: Path) -> None:
    """Catches a missing SIGTERM, a demo or GPU session that continues after its run has failed, and a demo that fails
    because a busy machine logs the first step when most of the time is over."""
    run = RunFolder(tmp_path)
    with pytest.raises(SystemExit, match="expected exit code 75 of the run, got 1"):
        stop_after(60, ["false"], run)
    event = '{"step": 1, "loss": 6.0}'
    training = f"trap 'exit 75' TERM; echo '{event}' > {run.metrics}; while :; do sleep 0.1; done"
    assert stop_after(0, ["sh", "-c", training], run)
    assert not stop_after(60, ["true"], run)
