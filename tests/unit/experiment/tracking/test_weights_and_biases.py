import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.weights_and_biases import WandbTracker


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[Mapping[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.logged.append(metrics)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define_metric", name, step_metric))

    def mark_preempting(self) -> None:
        self.calls.append(("mark_preempting",))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


class FakeWandb:
    """A replacement for the module; its attributes select what fails."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.failing_modes: tuple[str, ...] = ()
        self.has_key = True
        self.silent = False

    def setup(self, settings: dict[str, Any]) -> None:
        self.silent = settings["silent"]

    def login(self, prompt: bool) -> bool:
        assert not prompt, "asking at a terminal would stop the run"
        assert self.silent, "it would write into the progress line"
        return self.has_key

    Settings = staticmethod(lambda **settings: settings)

    def init(self, **options: Any) -> FakeRun:
        if options["mode"] in self.failing_modes:
            raise ConnectionError("no route")
        self.runs.append(FakeRun(**options))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def tracker(tmp_path: Path, mode: Any = "online", finish_seconds: float = 5.0) -> WandbTracker:
    config = TrackingConfig(wandb=mode, project="p", tags=("t",))
    return WandbTracker(config, RunFolder(tmp_path), "id7", {"a": 1}, finish_seconds=finish_seconds)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_resumes_under_its_id_with_our_step_as_axis(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a resume that opens a second run, W&B's own step as the x axis, and nulls, which it plots as text."""
    open_tracker = tracker(tmp_path)
    open_tracker.log({"step": 20, "loss": 1.0, "mfu": None})
    open_tracker.log({"step": 10, "loss": 2.0})
    open_tracker.close(Outcome.DONE)
    (run,) = fake.runs
    assert run.logged == [{"step": 20, "loss": 1.0}, {"step": 10, "loss": 2.0}]
    assert run.calls == [("define_metric", "step", None), ("define_metric", "*", "step"), ("finish", 0)]
    wanted = {
        "id": "id7",
        "resume": "allow",
        "mode": "online",
        "dir": str(tmp_path),
        "project": "p",
        "config": {"a": 1},
    }
    assert wanted.items() <= run.options.items()
    assert run.options["name"] == tmp_path.name


@pytest.mark.parametrize("outcome", list(Outcome))
def test_the_outcome_reaches_the_server(tmp_path: Path, fake: FakeWandb, outcome: Outcome) -> None:
    """Catches a stopped run that is shown as failed, or a failed one as finished."""
    tracker(tmp_path).close(outcome)
    assert fake.runs[0].calls[-1] == ("finish", outcome.exit_code)
    assert (("mark_preempting",) in fake.runs[0].calls) == (outcome is Outcome.STOPPED)


@pytest.mark.parametrize("trouble", ["network", "key"])
def test_a_run_that_cannot_be_online_is_logged_offline(
    tmp_path: Path, fake: FakeWandb, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """Catches events that are lost because the W&B server was down when the run started."""
    fake.failing_modes, fake.has_key = (("online",), True) if trouble == "network" else ((), False)
    open_tracker = tracker(tmp_path)
    open_tracker.log({"step": 1})
    open_tracker.close(Outcome.DONE)
    assert (fake.runs[0].options["mode"], fake.runs[0].options["resume"]) == ("offline", "allow")
    assert fake.runs[0].logged == [{"step": 1}]
    assert len(warnings(caplog)) == 1


def test_a_missing_package_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an ImportError that reaches the training loop."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_tracker = tracker(tmp_path)
    open_tracker.log({"step": 1})
    open_tracker.close(Outcome.DONE)
    assert len(warnings(caplog)) == 1
    assert "switched off" in warnings(caplog)[0]


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_a_later_failure_warns_once(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Catches a warning at every log event."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError("gone")

    monkeypatch.setattr(FakeRun, method, fail)
    open_tracker = tracker(tmp_path)
    for step in range(5):
        open_tracker.log({"step": step})
    open_tracker.close(Outcome.DONE)
    assert warnings(caplog) == ["W&B is switched off for this run: BrokenPipeError: gone"]


@pytest.mark.parametrize("method", ["log", "finish"])
def test_an_unresponsive_server_does_not_block(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Catches a run that waits for the network at a log event, or without a timeout at its end: it would wait forever
    here."""
    never = threading.Event()
    monkeypatch.setattr(FakeRun, method, lambda *arguments, **options: never.wait())
    open_tracker = tracker(tmp_path, finish_seconds=0.3)
    for step in range(1000):
        open_tracker.log({"step": step})
    open_tracker.close(Outcome.DONE)
    never.set()
    assert len(warnings(caplog)) == 1
    assert "did not finish in 0.3 s" in warnings(caplog)[0]


def test_log_copies_the_event(tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a queued mapping that the caller modifies later."""
    ready = threading.Event()
    monkeypatch.setattr(FakeWandb, "login", lambda self, prompt: ready.wait())
    open_tracker = tracker(tmp_path)
    event = {"step": 1}
    open_tracker.log(event)
    event["step"] = 2
    ready.set()
    open_tracker.close(Outcome.DONE)
    assert fake.runs[0].logged == [{"step": 1}]


SCRIPT = """
    import sys, time
    from pathlib import Path
    from experiment.outcome_file import Outcome
    from experiment.run_folder import RunFolder
    from experiment.tracking.config import TrackingConfig
    from experiment.tracking.weights_and_biases import WandbTracker

    folder, mode, finish_seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    began = time.perf_counter()
    config = TrackingConfig(wandb=mode)
    tracker = WandbTracker(config, RunFolder(folder), "id7", {"a": {"b": 1}}, finish_seconds=finish_seconds)
    for step in range(100):
        tracker.log({"step": step, "loss": 1.0})
    logged = time.perf_counter()
    tracker.close(Outcome.DONE)
    print(logged - began, time.perf_counter() - logged)
"""


def run_for_real(
    tmp_path: Path, mode: str, environment: dict[str, str], finish_seconds: float
) -> tuple[float, float, float]:
    """Seconds to open and log, to close, and for the whole process; with the real wandb."""
    folder, elsewhere = tmp_path / "run", tmp_path / "cwd"
    folder.mkdir()
    elsewhere.mkdir()
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    repository = Path(__file__).parents[4]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(repository), **environment}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), str(folder), mode, str(finish_seconds)],
        cwd=elsewhere,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(elsewhere.iterdir()), "wandb wrote into the working directory"
    assert "wandb:" not in done.stderr, "it wrote into the progress line"
    logged, closed = map(float, done.stdout.split())
    return logged, closed, time.perf_counter() - began


def test_offline_writes_into_the_run_folder(tmp_path: Path) -> None:
    """Catches settings that the installed wandb rejects, and a `wandb/` in the working directory."""
    run_for_real(tmp_path, "offline", {}, finish_seconds=120)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*-id7/*.wandb"))


def test_an_unreachable_network_does_not_delay_a_run(tmp_path: Path) -> None:
    """Catches retries of the real wandb that delay the start, the end or the exit of the process."""
    down = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    logged, closed, whole = run_for_real(tmp_path, "online", down, finish_seconds=3)
    assert logged < 40.0  # W&B tries for 60 s to connect
    assert closed < 3.0 + 40.0
    assert whole < 120.0  # it retries for much longer by default
