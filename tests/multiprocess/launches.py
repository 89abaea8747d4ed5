"""Whole runs as users start them: commands in the background, and waiting for what they do."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from experiment.run_files.run_folder import RunFolder
from fork_server import PATCH
from rank_pool import ForkServer
from runs import logged, run_config
from waiting import LIMIT, wait_until

LONG = 5000  # steps: the test stops the run earlier

# Code for `patched`, for runs that a test ends: others can compute meanwhile.
SLOW_STEPS = """
import sys, time
if "pretrain.run" in sys.orig_argv:
    from pretrain.engine.engine import Engine
    begin_step = Engine.begin_step
    def begin_slowly(*arguments):
        time.sleep(0.1)
        begin_step(*arguments)
    Engine.begin_step = begin_slowly
"""

MARK = "DEEPCLOZE_TEST_RUN"
"""Name of a variable in the environment of every process of a launch, for `marked`."""

Start = Callable[..., subprocess.Popen[str]]


def config_file(tmp_path: Path, corpus: Path, **changes: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path / "run", corpus, **changes)))
    return path


def patched(tmp_path: Path, code: str) -> dict[str, str]:
    """Variables with which commands run `code` first. Without effect in tests marked `real_start`."""
    path = tmp_path / "patch.py"
    path.write_text(code, encoding="utf-8")
    return {PATCH: str(path)}


def partly_forked(tmp_path: Path, fork_server: ForkServer, condition: str, code: str = "") -> dict[str, str]:
    """Variables for tests marked `real_start`: of the commands and of the processes that they start, those are forked
    for which this expression is true. All others run `code` first."""
    path, _, others = fork_server.environment()["PYTHONPATH"].partition(":")
    hand_over = f"import os, runpy, sys\nif {condition}:\n    runpy.run_path({path!r} + '/sitecustomize.py')\n"
    (tmp_path / "sitecustomize.py").write_text(hand_over + code, encoding="utf-8")
    return {"PYTHONPATH": f"{tmp_path}:{others}"}


def marked(folder: Path) -> list[psutil.Process]:
    """The processes of this run's launches."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_exit(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and the output. Fails with the output if the process does not end."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"did not end in {LIMIT:.0f} s:\n{process.communicate()[0]}") from None
    return process.returncode, output


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: RunFolder(folder).metrics.exists() and len(logged(folder)) >= steps, process)


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has written a file."""
    wait_until(path.exists, process)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that DeepSpeed's launcher sets for a rank on this machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
