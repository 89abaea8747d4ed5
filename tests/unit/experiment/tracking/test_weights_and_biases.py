import json
import logging
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiment.errors import UserError
from experiment.process.signals import WARNING_SIGNALS
from experiment.run_files.metrics_file import Event
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.alerts import Alert
from experiment.tracking.config import AlertsConfig, TrackingConfig
from experiment.tracking.weights_and_biases import WandbTracker, _read_records, last_step
from waiting import wait_until


class FakeRun:
    """Ignores rows as W&B does: those whose W&B step is not larger than that of the row before."""

    id = "id7"

    def __init__(self, starting_step: int = 0, **options: Any) -> None:
        self.options = options
        self.name, self.tags = options["name"], options["tags"]
        self.starting_step = self.next_step = starting_step
        self.logged: list[Mapping[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.summary: dict[str, float] = {}

    def log(self, metrics: Mapping[str, Any], step: int, commit: bool) -> None:
        assert commit, "a row that is not committed is lost by a kill"
        if step >= self.next_step:
            self.logged.append(metrics)
            self.next_step = step + 1

    def alert(self, title: str, text: str, level: str) -> None:
        assert len(title) < 64
        self.calls.append(("alert", title, text, level))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define_metric", name, step_metric))

    def log_artifact(self, artifact: "FakeArtifact") -> None:
        self.calls.append(("log_artifact", artifact.name, artifact.content))

    def mark_preempting(self) -> None:
        self.calls.append(("mark_preempting",))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name = name
        self.content: list[tuple[str, str]] = []

    def add_file(self, path: str, name: str, **options: Any) -> None:
        self.content.append((name, Path(path).read_text()))


class FakeWandb:
    """A replacement for the module; its attributes select what fails."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.failing_modes: tuple[str, ...] = ()
        self.has_key = True
        self.silent = False
        self.starting_step = 0  # what the server says: after its last row
        self.run: SimpleNamespace | None = None  # the active run of the caller
        self.messages: Any = None  # gets what would be printed

    def setup(self, settings: dict[str, Any]) -> None:
        self.silent = settings["silent"]

    def termsetup(self, settings: dict[str, Any], messages: Any) -> None:
        self.messages = messages

    def login(self, prompt: bool) -> bool:
        if self.run is not None:
            return False
        assert not prompt, "asking at a terminal would stop the run"
        assert self.silent, "it would write into the progress line"
        return self.has_key

    Artifact = FakeArtifact

    Settings = staticmethod(lambda **settings: settings)

    def init(self, **options: Any) -> FakeRun:
        if options["mode"] in self.failing_modes:
            raise ConnectionError("no route")
        self.runs.append(FakeRun(self.starting_step if options["mode"] == "online" else 0, **options))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def tracker(
    tmp_path: Path, mode: Any = "online", finish_seconds: float = 5.0, kept: Sequence[Event] = (), **options: Any
) -> WandbTracker:
    config = TrackingConfig(wandb=mode, project="p", tags=("t",), **options)
    return WandbTracker(config, RunFolder(tmp_path), "id7", {"a": 1}, kept, finish_seconds=finish_seconds)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_results_are_in_the_summary(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a table of runs in W&B without their scores, and a row that they would add to the curves."""
    open_tracker = tracker(tmp_path)
    open_tracker.log({"step": 20, "loss": 1.0})
    open_tracker.summarize({"test/f1": 0.7})
    open_tracker.close(Outcome.DONE)
    assert fake.runs[0].summary == {"test/f1": 0.7}
    assert fake.runs[0].logged == [{"step": 20, "loss": 1.0}]


def test_a_run_resumes_under_its_id_with_our_step_as_axis(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a resume that opens a second run, W&B's own step as the x axis, nulls, which it plots as text, and a
    table of runs with the step of a late score."""
    open_tracker = tracker(tmp_path)
    open_tracker.log({"step": 20, "loss": 1.0, "mfu": None})
    open_tracker.log({"step": 10, "downstream/task/accuracy": 0.5})
    open_tracker.close(Outcome.DONE)
    (run,) = fake.runs
    assert run.logged == [{"step": 20, "loss": 1.0}, {"step": 10, "downstream/task/accuracy": 0.5}]
    assert run.summary == {"step": 20}
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


def test_the_name_of_a_run(tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches cells of a comparison that all have the name of their task, or the one in their config, and a name of the
    user that is replaced."""
    monkeypatch.setenv("WANDB_NAME", "ours/toy")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    tracker(tmp_path).close(Outcome.DONE)
    tracker(tmp_path, name="mine").close(Outcome.DONE)
    monkeypatch.setenv("WANDB_RUN_GROUP", "of a job script")
    tracker(tmp_path, name="mine").close(Outcome.DONE)
    monkeypatch.setenv("DEEPCLOZE_RUN_SET", "1")
    tracker(tmp_path, name="mine").close(Outcome.DONE)
    assert [run.options["name"] for run in fake.runs] == ["ours/toy", "mine", "mine", "ours/toy"]


def test_a_resumed_run_keeps_its_name_and_tags(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a run of a comparison that `deepcloze watch`, or a resume by hand, names like its folder; tags of the
    user that are replaced; and a random name, without tags, because the earlier attempts did not use W&B."""
    tracker(tmp_path).close(Outcome.DONE)
    tracker(tmp_path, kept=[event(10)]).close(Outcome.DONE)
    fake.starting_step = 10 * 10_000 + 1
    tracker(tmp_path, kept=[event(10)]).close(Outcome.DONE)
    assert [run.name for run in fake.runs] == [tmp_path.name, tmp_path.name, ""]
    assert [run.tags for run in fake.runs] == [("t",), ("t",), ()]  # W&B reads WANDB_TAGS for None


def event(step: int, name: str = "loss") -> Event:
    return {"step": step, name: 1.0}


def evaluation(step: int) -> Event:
    return event(step, "eval/docs/loss")


SCORE = event(10, "downstream/task/accuracy")
FIRST = [evaluation(0), event(10), event(20), evaluation(20), SCORE, event(30)]
AGAIN = [evaluation(20), event(30), event(40), evaluation(40)]


@pytest.mark.parametrize("delivered", range(len(FIRST) + 1))
def test_nothing_is_doubled_or_missing_after_a_crash(tmp_path: Path, fake: FakeWandb, delivered: int) -> None:
    """Catches steps that appear twice because the run resumes from an earlier checkpoint, and those that a kill has
    kept from the server.

    delivered: events that have reached it; the run resumes at step 20, and repeats its evaluation.
    """
    first = tracker(tmp_path)
    for logged in FIRST[:delivered]:
        first.log(logged)
    first.close(Outcome.FAILED)
    fake.starting_step = fake.runs[0].next_step if delivered else 0
    resumed = tracker(tmp_path, kept=[FIRST[0], FIRST[1], FIRST[2], FIRST[4]])
    for logged in AGAIN:
        resumed.log(logged)
    resumed.close(Outcome.DONE)
    shown = fake.runs[0].logged + fake.runs[1].logged
    key = json.dumps
    assert sorted(map(key, shown)) == sorted(map(key, [*FIRST, event(40), evaluation(40)]))


def test_kept_events_are_released(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches all earlier metrics of a long run in memory until it ends."""

    class Events(list[Event]):
        pass

    kept = Events(FIRST)
    released = weakref.ref(kept)
    resumed = tracker(tmp_path, kept=kept)
    del kept
    wait_until(lambda: released() is None)
    resumed.close(Outcome.DONE)


def test_a_score_that_comes_while_steps_are_repeated(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a score of an earlier checkpoint that is taken for one of the repeated steps, and lost."""
    fake.starting_step = 500 * 10_000
    resumed = tracker(tmp_path)
    for logged in (event(100), event(90, "downstream/x"), event(510)):
        resumed.log(logged)
    resumed.close(Outcome.DONE)
    assert fake.runs[0].logged == [event(90, "downstream/x"), event(510)]


def test_scores_of_the_last_step(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches scores of the last checkpoint that `deepcloze watch` cannot add when the run has ended, and those that
    appear twice, or never if they were not delivered, when another one is added."""
    first = tracker(tmp_path)
    for logged in (event(10), evaluation(10)):
        first.log(logged)
    first.close(Outcome.DONE)
    kept = [event(10), evaluation(10)]
    for task, delivered in (("a", True), ("b", False), ("c", True)):
        fake.starting_step = max(run.next_step for run in fake.runs)
        added = tracker(tmp_path, kept=kept)
        added.log(event(10, f"downstream/{task}/accuracy"))
        added.close(Outcome.DONE)
        kept.append(event(10, f"downstream/{task}/accuracy"))
        if not delivered:
            fake.runs.pop()
    scores = [logged for run in fake.runs[1:] for logged in run.logged]
    assert scores == [event(10, f"downstream/{task}/accuracy") for task in "abc"]


def test_alerts_are_sent_if_enabled(tmp_path: Path, fake: FakeWandb) -> None:
    """Catches a title that W&B refuses, an alert without its text, and one that was not asked for."""
    folder = tmp_path / ("long" * 20)
    for enabled in (True, False):
        open_tracker = tracker(folder, alerts=AlertsConfig(wandb=enabled))
        open_tracker.alert(Alert("bad_batch", "step 7"))
        open_tracker.alert(Alert("finish", "done"))
        open_tracker.close(Outcome.DONE)
    sent, none = [[call for call in run.calls if call[0] == "alert"] for run in fake.runs]
    assert [(title.partition(":")[0], *rest) for _, title, *rest in sent] == [
        ("bad batch", "step 7", "ERROR"),
        ("finish", "done", "INFO"),
    ]
    assert none == []


@pytest.mark.parametrize("failing", [False, True])
def test_the_origin_of_the_results_is_saved(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: bool
) -> None:
    """Catches an artifact that lacks config, provenance or report, one that was not asked for, a report that cannot be
    drawn and leaves the W&B run unfinished, and one that is drawn in the time for uploading."""
    folder, drawn_in = RunFolder(tmp_path), list[threading.Thread]()

    def write_report(path: Path, outcome: Outcome) -> Path:
        assert outcome is Outcome.DONE
        drawn_in.append(threading.current_thread())
        if failing:
            raise UserError("nothing to report")
        folder.report.mkdir()
        (folder.report / "index.html").write_text("curves")
        return folder.report / "index.html"

    monkeypatch.setattr("experiment.results.report.pages.write_report", write_report)
    folder.config.write_text("a: 1")
    folder.provenance.write_text("{}")
    tracker(tmp_path, artifacts=True).close(Outcome.DONE)
    tracker(tmp_path).close(Outcome.DONE)
    content = [("config.yaml", "a: 1"), ("provenance.json", "{}"), ("report/index.html", "curves")]
    assert [run.calls[2:] for run in fake.runs] == [
        [*([] if failing else [("log_artifact", "run-id7", content)]), ("finish", 0)],
        [("finish", 0)],
    ]
    assert drawn_in == [threading.current_thread()], "before the timeout of the upload begins"
    assert len(warnings(caplog)) == failing


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


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_a_caller_with_an_active_run(tmp_path: Path, fake: FakeWandb, mode: str) -> None:
    """Catches a run that is logged offline, although the caller is logged in, and W&B that asks for a key."""
    fake.run = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    tracker(tmp_path).close(Outcome.DONE)
    assert [run.options["mode"] for run in fake.runs] == ["online" if mode == "online" else "offline"]


def test_the_end_of_uploads_is_reported(tmp_path: Path, fake: FakeWandb, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a page that stands still for weeks, and W&B's other messages in the log."""
    open_tracker = tracker(tmp_path)
    wait_until(lambda: fake.runs)
    fake.messages.info("wandb: 403 encountered ({}), retrying request")
    fake.messages.warning("wandb: WARNING Fatal error while uploading data. Some run data will not be synced")
    fake.messages.error("wandb: ERROR something else")
    open_tracker.close(Outcome.DONE)
    (warning,) = warnings(caplog)
    assert warning.startswith("W&B has stopped uploading")


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
    assert f"wandb sync --include-online {tmp_path}/wandb/latest-run" in warnings(caplog)[0]


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
    import atexit, os, sys, time
    from pathlib import Path
    from experiment.run_files.outcome_file import Outcome
    from experiment.run_files.run_folder import RunFolder
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
    print(logged - began, time.perf_counter() - logged, flush=True)
    atexit._run_exitfuncs()  # as commands end: Python ends threads, such as W&B's, in the middle, which may abort
    os._exit(0)
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
    assert last_step(tmp_path / "run" / "wandb", "id7") == 99 * 10_000
    assert last_step(tmp_path / "run" / "wandb", "other") == -1


def test_the_run_of_the_caller_stays_active(tmp_path: Path) -> None:
    """Catches a notebook whose own W&B run gets the rows of a fine-tuning, and is finished with it."""
    code = """
        import sys, wandb
        from pathlib import Path
        from experiment.run_files.outcome_file import Outcome
        from experiment.run_files.run_folder import RunFolder
        from experiment.tracking.config import TrackingConfig
        from experiment.tracking.weights_and_biases import WandbTracker

        folder = RunFolder(Path(sys.argv[1]))
        with wandb.init(mode="offline", dir=sys.argv[2], id="mine") as mine:
            tracker = WandbTracker(TrackingConfig(wandb="offline"), folder, "run", {}, finish_seconds=120)
            tracker.log({"step": 3, "loss": 1.0})
            tracker.close(Outcome.DONE)
            assert wandb.run is mine
            mine.log({"loss": 1.0})
            wandb.log({"loss": 2.0})
    """
    for name in ("run", "mine"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run"), str(tmp_path / "mine")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [last_step(tmp_path / name / "wandb", name) for name in ("run", "mine")] == [30_000, 1]


def test_an_unreachable_network_does_not_delay_a_run(tmp_path: Path) -> None:
    """Catches retries of the real wandb that delay the start, the end or the exit of the process."""
    down = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    logged, closed, whole = run_for_real(tmp_path, "online", down, finish_seconds=3)
    assert logged < 40.0  # W&B tries for 60 s to connect
    assert closed < 3.0 + 40.0
    assert whole < 120.0  # it retries for much longer by default


def test_a_warning_of_a_batch_system_does_not_end_the_process_of_wandb(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches W&B's process killed by SIGUSR1 to all processes of a job, before the last steps are uploaded."""
    blocked: list[set[int]] = []
    login = fake.login

    def look(prompt: bool) -> bool:
        blocked.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        return login(prompt)

    monkeypatch.setattr(fake, "login", look)
    tracker(tmp_path).close(Outcome.DONE)
    assert set(WARNING_SIGNALS) <= blocked[0]


HEADER = b":W&B\xe1\xbe\x00"


def log(*records: bytes) -> bytes:
    """A file of these records, as the description of LevelDB's format says."""
    data = bytearray(HEADER)
    for record in records:
        first = True
        while first or record:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                continue
            part, record = record[: left - 7], record[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return bytes(data)


RECORDS = [b"a", b"b" * 100_000, b"", b"c" * (32768 - 20), b"d" * 40]


def test_records_are_read_across_blocks() -> None:
    """Catches a reader that stops, or is wrong, where a record does not fit into a block."""
    assert list(_read_records(log(*RECORDS))) == RECORDS
    for size in range(32768 - 30, 32768 + 5):
        records = [b"x" * size, b"end"]
        assert list(_read_records(log(*records))) == records


@pytest.mark.parametrize("lost", [1, 41, 1000, 99_000])
def test_a_file_that_was_cut_off_is_read_up_to_there(lost: int) -> None:
    """Catches a run that does not resume offline after a power cut."""
    data = log(*RECORDS)[:-lost]
    read = list(_read_records(data))
    assert read == RECORDS[: len(read)]
    assert len(read) < len(RECORDS)


def test_a_damaged_file_is_read_up_to_there(tmp_path: Path) -> None:
    """Catches damage that is taken for a row."""
    data = bytearray(log(b"first", b"second"))
    data[-1] ^= 1
    assert list(_read_records(bytes(data))) == [b"first"]
