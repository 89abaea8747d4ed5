"""Whole runs that log to a W&B server which is down, broken or refuses them, or to a full disk."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import is_locked
from launches import LONG, SLOW_STEPS, Start, config_file, patched, wait_for_exit, wait_for_steps
from rank_pool import ForkServer, RankPool
from runs import logged, pretrain_case, run_config
from small_disk import SmallDisk
from waiting import wait_until
from wandb_server import FakeServer, dead_port, silent_server, wandb_server

STEPS = 40
END_SECONDS = 90.0  # until a run that is stopped has exited, on a busy machine; W&B itself gets 30


@contextmanager
def _broken_server(status: int) -> Iterator[str]:
    with wandb_server(status) as server:
        yield server.url


def _variables(url: str, home: Path) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "HOME": str(home)}


@pytest.fixture
def undisturbed(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> Callable[[int], list[float]]:
    """The losses of so many steps without W&B."""

    def losses(steps: int) -> list[float]:
        tree = run_config(tmp_path / "disabled", wordpiece_corpus, schedule__steps=LONG)
        pools[1].run(pretrain_case, tree, steps)
        return logged(tmp_path / "disabled")

    return losses


TROUBLE: dict[str, Callable[[], contextlib.AbstractContextManager[str]]] = {
    "a wrong key": lambda: _broken_server(401),
    "a dead port": dead_port,
    "no answer": silent_server,
    "error 500": lambda: _broken_server(500),
}


@pytest.mark.soak
@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_run_without_its_server(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, undisturbed: Callable[[int], list[float]], trouble: str
) -> None:
    """Catches W&B that changes a loss, keeps a run from ending, or loses the metrics, which are kept for later."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, tracking__wandb="online")
    folder = tmp_path / "run"
    with TROUBLE[trouble]() as url:
        process = start(sys.executable, "-m", "pretrain.run", "--config", str(config), **_variables(url, tmp_path))
        wait_for_steps(folder, STEPS, process)
        steps, output = _stop_in_time(process, folder)
    assert output.count("W&B") == 1, output
    assert "W&B cannot be reached" in output
    assert logged(folder) == undisturbed(steps)
    assert _local_steps(folder) == steps, "`wandb sync` has nothing to send"


@pytest.mark.soak
@pytest.mark.parametrize("full", ["from the start", "later"])
def test_a_run_whose_disk_for_wandb_is_full(
    start: Start,
    wordpiece_corpus: Path,
    tmp_path: Path,
    small_disk: SmallDisk,
    undisturbed: Callable[[int], list[float]],
    full: str,
) -> None:
    """Catches W&B that changes a loss or keeps a run from ending because it cannot write its files."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, tracking__wandb="online")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb").symlink_to(small_disk.path)
    if full == "from the start":
        small_disk.fill(new_files=False)
    with wandb_server() as server:
        variables = _variables(server.url, tmp_path)
        process = start(sys.executable, "-m", "pretrain.run", "--config", str(config), **variables)
        if full == "later":
            wait_until(lambda: server.history, process)
            small_disk.fill(new_files=False)
        wait_for_steps(folder, 100, process)
        steps, _ = _stop_in_time(process, folder)
    assert logged(folder) == undisturbed(steps)


@pytest.mark.soak
@pytest.mark.parametrize("trouble", ["error 500", "error 403", "no answer"])
def test_a_server_that_breaks_during_a_run(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, undisturbed: Callable[[int], list[float]], trouble: str
) -> None:
    """Catches a run that waits without end for what W&B has not uploaded when it ends, and metrics that are lost; and a
    page that stands still, without a word, for weeks."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, tracking__wandb="online")
    folder = tmp_path / "run"
    with wandb_server() as server:
        variables = _variables(server.url, tmp_path)
        process = start(sys.executable, "-m", "pretrain.run", "--config", str(config), **variables)
        wait_until(lambda: server.history, process)
        if trouble == "no answer":
            server.answering.clear()
        else:
            server.status = int(trouble.split()[1])
        reached = len(logged(folder))
        wait_for_steps(folder, reached + 50, process)
        if trouble == "error 403":
            wait_until(lambda: "W&B has stopped uploading" in RunFolder(folder).rank_log(0).read_text(), process)
        steps, _ = _stop_in_time(process, folder)
    assert logged(folder) == undisturbed(steps)
    assert _local_steps(folder) == steps, "`wandb sync` has nothing to send"


def test_no_step_is_doubled_or_missing_after_a_kill(
    start: Start, fork_server: ForkServer, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches steps that appear twice in W&B or TensorBoard after a crash, or not at all, with the real packages; and a
    resume that names the W&B run again."""
    config = config_file(
        tmp_path,
        wordpiece_corpus,
        schedule__steps=LONG,
        checkpoint__every_steps=7,
        tracking__wandb="online",
        tracking__tensorboard=True,
    )
    folder = tmp_path / "run"
    with wandb_server() as server:
        command = (sys.executable, "-m", "pretrain.run", "--config", str(config))
        killed = start(*command, **_variables(server.url, tmp_path), **patched(tmp_path, SLOW_STEPS))
        wait_until(lambda: len(server.history) > 10, killed)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        wait_until(lambda: not is_locked(RunFolder(folder)))  # its process, which the fork server kills, has ended
        reached = len(logged(folder))
        resumed = start(*command, **_variables(server.url, tmp_path), **fork_server.environment())
        wait_for_steps(folder, reached + 5, resumed)
        (folder / "STOP").touch()
        code, output = wait_for_exit(resumed)
    assert code == 75, output
    steps = logged(folder, "step")
    assert steps == list(range(1, len(steps) + 1))
    assert _shown(server) == logged(folder)
    assert server.names == ["run"]
    assert _event_file(folder) == pytest.approx(logged(folder), rel=1e-6)  # in single precision


def _stop_in_time(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, str]:
    """Stop a run and wait until it has ended. Returns the number of its steps, and its output."""
    (folder / "STOP").touch()
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 75, output
    return len(logged(folder)), output


def _shown(server: FakeServer) -> list[float]:
    """The losses of the rows, which must be those of steps 1, 2, 3, …"""
    rows = [row for row in server.history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def _event_file(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    events = accumulator.Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, len(events) + 1))
    return [event.value for event in events]


def _local_steps(folder: Path) -> int:
    from experiment.tracking.weights_and_biases import last_step

    run_id = json.loads((folder / "provenance.json").read_text())["run_id"]
    return last_step(folder / "wandb", run_id) // 10_000
