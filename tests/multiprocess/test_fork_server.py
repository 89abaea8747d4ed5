"""Commands that are handed over to the fork server behave like started ones."""

import fcntl
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import sklearn
import yaml

from fork_server import TITLE
from launches import Start, patched, wait_for_exit
from pretrain.world import World
from rank_pool import ForkServer, RankPool
from waiting import wait_until

PRETRAIN = (sys.executable, "-m", "pretrain.run", "--config")


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Iterator[str]:
    """Of a rank that waits at a gate: in a folder that is locked, as a launch locks it."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, "corpus": {"train": str(wordpiece_corpus)}}))
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield str(path)
    os.close(descriptor)


def forked(first: int, mark: str) -> psutil.Process:
    """The process in which the command of the process `first` runs: the child of the server with the same variable."""
    found: list[psutil.Process] = []

    def search() -> bool:
        for process in psutil.process_iter():
            try:
                if process.pid != first and process.environ().get("MARK") == mark and is_served(process):
                    found.append(process)
            except psutil.Error:
                continue
        return bool(found)

    wait_until(search)
    return found[0]


def is_served(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and TITLE in parent.cmdline()


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # it may end between the two calls
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both_processes(start: Start, tmp_path: Path, config: str, number: signal.Signals) -> None:
    """Catches signals that do not reach the command, another exit status, and a command that outlives a killed
    process."""
    gate = tmp_path / "gate"
    first = start(*PRETRAIN, config, MARK=str(tmp_path), DEEPCLOZE_GATE=str(gate))
    second = forked(first.pid, str(tmp_path))
    assert " ".join(second.cmdline()).rstrip() == " ".join([*PRETRAIN, config])
    assert second.cwd() == str(tmp_path)
    first.send_signal(number)
    code, output = wait_for_exit(first)
    assert code == -number, output
    wait_until(lambda: has_ended(second))


def test_the_end_of_the_command_ends_the_process(start: Start, tmp_path: Path, config: str) -> None:
    """Catches a killed rank whose death its launcher does not see."""
    first = start(*PRETRAIN, config, MARK=str(tmp_path), DEEPCLOZE_GATE=str(tmp_path / "gate"))
    second = forked(first.pid, str(tmp_path))
    second.kill()
    wait_until(lambda: has_ended(second))
    assert wait_for_exit(first)[0] == -signal.SIGKILL


def test_output_and_exit_code_are_those_of_the_command(start: Start, tmp_path: Path) -> None:
    """Catches lost arguments, output or exit codes, variables that were read at an import of the server, and commands
    that it refuses once their test process has compiled."""
    command = (sys.executable, "-m", "launcher", "logs", "missing")
    taken = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | patched(tmp_path, "")  # with a patch, or it fails
    for variables in (taken, {"HF_HOME": str(tmp_path)}):  # with the second, the server refuses it
        code, output = wait_for_exit(start(*command, **variables))
        assert code == 2
        assert output == f"deepcloze: there is no run folder {tmp_path}/missing\n"


@pytest.mark.real_start
def test_commands_of_marked_tests_are_not_handed_over(start: Start, tmp_path: Path) -> None:
    process = start(sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))")
    assert wait_for_exit(process) == (0, f"{os.environ.get('PYTHONPATH')}\n")


def server_case(world: World) -> tuple[int, dict[str, str]]:
    """The server of a rank, and its variables."""
    return os.getppid(), dict(os.environ)


def test_a_server_is_forked_from_another(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a server for each test process that imports everything again, ranks that have the cache folder of another
    test process, a server that refuses commands once its test process has imported sklearn, and a server that outlives
    its test process."""
    monkeypatch.setenv("MARK", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("KMP_")]:
        monkeypatch.delenv(name)
    server = ForkServer(tmp_path, parent=fork_server.environment()["PYTHONPATH"].partition(":")[0])
    pool = RankPool(server, 1)
    ((pid, variables),) = pool.run(server_case)
    process = psutil.Process(pid)
    assert is_served(process)
    assert variables["MARK"] == str(tmp_path)
    importlib.reload(sklearn)
    read = {name: value for name, value in os.environ.items() if name.startswith("KMP_")}
    assert read
    assert {name: variables.get(name) for name in read} == read
    pool.close()
    server.close()
    wait_until(lambda: has_ended(process))


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not in a test process of pytest-xdist")
def test_the_server_of_a_test_process_is_forked(pools: dict[int, RankPool]) -> None:
    """Catches a variable that a module of the tests sets while it is imported, and that libraries read: the server of
    the first process refuses to fork the others', and each imports everything."""
    ((pid, _),) = pools[1].run(server_case)
    assert is_served(psutil.Process(pid))


def test_a_server_that_nobody_needs_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tests that end with seconds of imports although none needs a server."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "deepspeed.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    ForkServer(tmp_path).close()
    assert (tmp_path / "output.log").read_text() == ""
