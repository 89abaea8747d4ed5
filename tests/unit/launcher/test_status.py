import errno
import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiment.results.report.run import open_runs
from experiment.run_files import run_life, run_lock
from experiment.run_files.goodput import CHECKPOINTING, EVALUATING, ActivityTimer
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, write_outcome
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder, is_run, open_run_folder
from experiment.run_files.run_life import Life, read_life
from experiment.run_files.run_lock import FolderUse, LockTimes, folder_use, lock_run
from launcher.cli import main
from launcher.status import read_status
from launcher.supervision.launch_result import begin_attempt
from launcher.supervision.rank_processes import polled

HOST = platform.node()
FAST = LockTimes(renew=0.05, observe=0.2)


def make_run(path: Path) -> str:
    open_run_folder(path).metrics.write_text('{"step": 1200, "loss": 3.25, "tokens_per_second": 45678.9}\n')
    return str(path)


def test_one_run_is_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures that are missing, a failure without its reason, and a name that changes the terminal."""
    run = make_run(tmp_path / "\x1b[2J")
    write_outcome(open_run_folder(run), Outcome.FAILED, "rank 1 was killed", Cause.KILLED)
    checkpoint = Path(run, "checkpoints", "step-00001100")
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    assert main(["status", run]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [rf"{tmp_path}/\x1b[2J"]
    expected = "state failed", "step 1,200", "loss 3.2500", "tokens/s 45,679", "attempts 0", "rank 1 was killed"
    assert [text.split() for text in expected if text.split() not in lines] == []
    assert ["last", "checkpoint", "1,100,"] in [line[:3] for line in lines]


def test_several_runs_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a table that is cut off in a pipe, or has the runs in another order."""
    runs = [make_run(tmp_path / ("run-" + name * 20)) for name in "ba"]
    with lock_run(open_run_folder(runs[0])):
        assert main(["status", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (number for number, line in enumerate(lines) if runs[0] in line)
    (second,) = (number for number, line in enumerate(lines) if runs[1] in line)
    assert first < second
    assert "running" in lines[first]
    assert all("45,679" in lines[number] for number in (first, second))


def test_a_narrow_terminal_shows_fewer_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches columns so narrow that no figure can be read, and a name that changes the terminal."""
    for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path("runs/first")), make_run(Path("runs/\x1b[2J"))]
    assert main(["status", *runs]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("runs/first", r"runs/\x1b[2J", "1,200", "3.2500")), shown
    assert "…" not in shown
    assert "left out to fit the terminal: attempts, goodput" in shown


def test_json_is_a_list_of_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches output that differs between one and several runs, or has anything else on stdout."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for given in (runs[:1], runs):
        assert main(["status", *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [(status["run"], status["step"], status["state"]) for status in found] == [
            (run, 1200, "unknown") for run in given
        ]


def test_an_unknown_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a wrong exit code, and a status that is printed before the mistake is found."""
    assert main(["status", make_run(tmp_path / "a"), str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"deepcloze: there is no run folder {tmp_path}/none\n"
    assert captured.out == ""


def test_folders_that_are_no_runs_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `status runs/*` that fails because there is a report or a file, one that hides a misspelled run, and
    logs of the user that hide all runs."""
    run, report, file = make_run(tmp_path / "a"), str(tmp_path / "report"), str(tmp_path / "sweep.log")
    (tmp_path / "logs").mkdir()
    Path(report).mkdir()
    Path(file).touch()
    assert main(["status", run, report, file, "--json"]) == 0
    captured = capsys.readouterr()
    assert [status["run"] for status in json.loads(captured.out)] == [run]
    skipped = "is skipped: it is not a run folder and contains none\n"
    assert captured.err == f"deepcloze: {report} {skipped}deepcloze: {file} {skipped}"
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert [status["run"] for status in json.loads(capsys.readouterr().out)] == [run]
    assert main(["status", report, report]) == 2
    assert "report is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_folder_that_may_not_be_read_hides_no_other_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Catches `status` of a disk that has a folder of another user, such as lost+found, or a file that is private or
    cannot be read."""
    names = {name: make_run(tmp_path / name) for name in ("lost+found", "private", "run")}

    def refuse(function: Callable[..., object], name: str) -> Callable[..., object]:
        def refused(folder: RunFolder | str) -> object:
            if name in str(folder):
                raise OSError(13 if name == "lost+found" else number, "refused", names[name])
            return function(folder)

        return refused

    monkeypatch.setattr("experiment.run_files.run_folder.is_run", refuse(is_run, "lost+found"))
    monkeypatch.setattr("launcher.status.read_status", refuse(read_status, "private"))
    monkeypatch.setattr("experiment.results.report.run.read_life", refuse(read_life, "private"))
    assert main(["status", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert [status["run"] for status in json.loads(captured.out)] == [names["run"]]
    assert captured.err == f"deepcloze: {names['private']} is skipped: {names['private']}: {os.strerror(number)}\n"
    opened = open_runs({name: RunFolder(Path(path)) for name, path in names.items() if name != "lost+found"})
    assert [run.name for run in opened] == ["run"]
    assert "warning: private is left out: " in capsys.readouterr().err


def test_all_runs_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches runs of sweeps and comparisons that are not shown, such as those that have not started."""
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert f"there is no run folder {tmp_path}/runs" in capsys.readouterr().err
    make_run(Path("runs/a"))
    for name, record in [
        ("sweep", {"metric": "loss", "runs": {"lr=1": {}, "lr=2": {}}}),
        ("compare", {"base/sst2": {}, "base/grid": {}}),
        ("compare/base/grid", {"runs": {"lr=3": {}}}),
    ]:
        folder = open_run_folder(Path("runs") / name).path
        (folder / ("runs.json" if name == "compare" else "sweep.json")).write_text(json.dumps(record))
    make_run(Path("runs/sweep/lr=1"))
    Path("runs/report").mkdir()
    assert main(["status", "--json"]) == 0
    assert [(status["run"], status["state"]) for status in json.loads(capsys.readouterr().out)] == [
        ("runs/a", "unknown"),
        ("runs/compare/base/sst2", "not started"),
        ("runs/compare/base/grid/lr=3", "not started"),
        ("runs/sweep/lr=1", "unknown"),
        ("runs/sweep/lr=2", "not started"),
    ]
    assert main(["status", "runs", str(tmp_path / "runs" / "a"), "runs/sweep", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5, "given twice"
    assert main(["status", "runs/sweep"]) == 0
    assert "lr=2" in capsys.readouterr().out


def test_a_fine_tuning_of_an_earlier_version(folder: RunFolder) -> None:
    """Catches a finished run that is `unknown` because it has not recorded how it ended, and a traceback for results of
    another form."""
    write_events(folder, {"step": 1, "loss": 1.0})
    for results in ("{}", '{"metric": "accuracy", "splits": []}'):
        folder.results.write_text(results)
        assert read_life(folder) == Life("done")
        assert read_status(str(folder.path)).score is None


def test_a_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a fine-tuning run that is shown as a pretraining run without checkpoints, or without its scores."""
    folder = open_run_folder(make_run(tmp_path / "run"))
    folder.config.write_text("training: {seeds: [1, 2, 3]}\n")
    for seed in (2, 4):  # the last one was left out later
        (folder.path / f"seed-{seed}").mkdir()
        (folder.path / f"seed-{seed}" / "COMPLETE").touch()
    scores = {split: {"accuracy": {"mean": mean, "std": None}} for split, mean in (("validation", 0.5), ("test", 0.75))}
    scores["probes"] = {"f1": {"mean": 0.25, "std": None}}  # without the metric
    (folder.path / "results.json").write_text(json.dumps({"metric": "accuracy", "splits": scores}))
    write_outcome(folder, Outcome.DONE)
    assert main(["status", str(folder.path)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["state", "done"],
        ["seeds", "1", "of", "3"],
        ["score", "accuracy", "0.7500", "on", "test"],
        ["step", "1,200"],
        ["loss", "3.2500"],
        ["tokens/s", "45,679"],
        ["time", "left", "–"],
        ["attempts", "0"],
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(run_life, "folder_use", partial(folder_use, times=FAST))
    return open_run_folder(tmp_path / "run")


def write_events(folder: RunFolder, *events: dict[str, Any]) -> None:
    folder.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))


def owned(folder: RunFolder, **changes: Any) -> None:
    """What a process leaves that does not end properly."""
    folder.owner.write_text(json.dumps({**run_lock.this_machine(), "pid": 7, "id": "1", **changes}))


def renewed(folder: RunFolder) -> AbstractContextManager[None]:
    """The file of the owner is renewed, as by a process that is alive."""

    def renew() -> bool:
        os.utime(folder.owner)
        return False

    return polled(renew, 0.02, "renew")


def test_a_run_of_this_machine_is_alive_while_it_is_locked(folder: RunFolder) -> None:
    """Catches a killed run that counts as alive, and one that is alive but counts as killed."""
    assert read_life(folder) == Life("not started")
    with lock_run(folder):
        assert read_life(folder) == Life("running", HOST)
    owned(folder)
    assert read_life(folder) == Life("killed", HOST)


def test_a_run_of_another_machine_is_alive_while_it_renews_its_file(folder: RunFolder) -> None:
    """Catches a run of a silent machine that counts as alive or as dead: neither is known."""
    owned(folder, host="elsewhere", boot="1")
    with renewed(folder):
        assert read_life(folder) == Life("running", "elsewhere")
    os.utime(folder.owner, (0, 0))
    life = read_life(folder)
    assert (life.state, life.host) == ("unknown", "elsewhere")
    assert life.message.startswith("elsewhere has not renewed logs/launch.owner for ")
    assert life.message.endswith("h" + life.message[-3:])
    folder.owner.unlink()
    assert folder_use(folder, FAST) == FolderUse(alive=False)


def test_how_a_run_ended(folder: RunFolder) -> None:
    """Catches a run that has ended with an outcome of an earlier attempt, or without its message."""
    write_outcome(folder, Outcome.STOPPED, "stopped: found STOP", Cause.SIGNAL)
    assert read_life(folder) == Life("stopped", None, "stopped: found STOP")
    owned(folder)  # the launcher was killed when the ranks had ended
    assert read_life(folder) == Life("stopped", None, "stopped: found STOP")
    with lock_run(folder):
        assert read_life(folder).state == "running"


@pytest.mark.parametrize(
    ("host", "pid", "exit_code", "state"),
    [
        (HOST, os.getpid(), None, "running"),
        (HOST, 2**22 + 1, None, "killed"),
        (HOST, os.getpid(), 1, "failed"),
        ("elsewhere", os.getpid(), None, "unknown"),
    ],
    ids=["running", "killed", "failed", "elsewhere"],
)
def test_a_run_without_our_launcher(folder: RunFolder, host: str, pid: int, exit_code: int | None, state: str) -> None:
    """Catches a run that `deepspeed` has started itself, which locks nothing, and counts as not started."""
    RankRecord(0, host, pid, training=True, exit=exit_code).write(folder)
    assert read_life(folder).state == state


def test_the_figures_of_a_run(folder: RunFolder) -> None:
    """Catches an evaluation or a score of an earlier step in place of the last figures, and a wrong time left."""
    write_events(
        folder,
        {"step": 10, "loss": 5.0, "tokens_per_second": 90.0},
        {"step": 20, "loss": 4.0, "tokens_per_second": 100.0},
        {"step": 20, "eval/wiki/loss": 3.0},
        {"step": 10, "downstream/sst2/accuracy": 0.5},
    )
    now = 1000.0
    timer = ActivityTimer(990.0, clock=lambda: now, now=lambda: now)
    timer.open(folder, step=0, total_steps=50)
    timer.begin_training()
    for step in range(1, 21):
        now += 2.0
        timer.finish_step(step)
        timer.record()
    for step in (10, 20):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (folder.checkpoints / "step-00000010" / "COMPLETE").touch()  # the other one is being saved
    folder.bad_batch(7).mkdir(parents=True)
    for _ in range(3):
        begin_attempt(folder, {"localhost": (0,)}, 0.0)
    with lock_run(folder), timer.during(CHECKPOINTING):
        status = read_status(str(folder.path))
    assert (status.state, status.activity, status.step, status.total_steps) == ("running", "checkpointing", 20, 50)
    assert (status.loss, status.tokens_per_second, status.seconds_left) == (4.0, 100.0, 60.0)
    assert (status.checkpoint_step, status.bad_batches, status.attempts) == (10, 1, 3)
    assert 0 <= status.checkpoint_age < 3600
    assert status.goodput == pytest.approx(40 / 50)
    assert read_status(str(folder.path)).seconds_left is None, "it has ended"
    damaged = folder.checkpoints / "step-00000040"  # the run has resumed from an earlier one
    damaged.mkdir()
    (damaged / "COMPLETE").touch()
    status = read_status(str(folder.path))
    assert (status.step, status.checkpoint_step) == (20, 10)


def test_the_time_left_has_evaluations(folder: RunFolder) -> None:
    """Catches a time left at the speed of the last events, between two evaluations, also of a run whose earlier lines
    were removed."""
    now = 1000.0
    timer = ActivityTimer(1000.0, clock=lambda: now, now=lambda: now)
    timer.open(folder, step=0, total_steps=2000)
    timer.begin_training()
    for step in range(1, 1001):
        now += 1.0
        timer.finish_step(step)
        timer.record()
        if step % 100 == 50:
            with timer.during(EVALUATING):
                now += 100.0
    with lock_run(folder):
        assert read_status(str(folder.path)).seconds_left == 2000.0


def test_the_progress_of_a_fine_tuning(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a fine-tuning without its total steps, time left and attempts, a time left at the speed of the steps that
    an earlier command has trained, steps of seeds that are trained at a time but not counted, and loss and speed of
    a finished seed, or of one that an earlier command has trained, in place of theirs."""
    folder.config.write_text("training: {seeds: [1, 2, 3]}\n")
    assert (read_status(str(folder.path)).total_steps, read_status(str(folder.path)).attempts) == (None, 0)
    now = datetime(2026, 11, 20, 9, 20, tzinfo=UTC)
    write_provenance(folder, {"date": "2026-11-19T09:20:00+00:00"})  # of version 0.2.0
    with lock_run(folder):
        assert (read_status(str(folder.path)).total_steps, read_status(str(folder.path)).attempts) == (None, 1)
    write_provenance(folder, {"date": now.isoformat(), "step": 200, "total_steps": 900})
    folder.metrics.touch()
    with lock_run(folder):
        assert read_status(str(folder.path)).seconds_left is None, "nothing is logged yet"
    write_events(folder, {"step": 100, "loss": 1.0, "seed": 1})
    os.utime(folder.metrics, (0, now.timestamp() + 50))
    with lock_run(folder):
        status = read_status(str(folder.path))
        assert (status.step, status.total_steps, status.seconds_left, status.attempts) == (100, 900, None, 2)
        for seed, step in ((2, 150), (3, 50)):
            path = folder.logs / f"seed-{seed}.jsonl"
            event = {"step": step, "loss": seed / 10, "tokens_per_second": 1000 * seed, "seed": seed}
            path.write_text(json.dumps(event) + "\n")
            os.utime(path, (0, now.timestamp() + 110 - 5 * seed))
        status = read_status(str(folder.path))
        assert (status.state, status.step, status.seconds_left) == ("running", 300, 600.0)
        assert (status.loss, status.tokens_per_second) == (0.25, 5000)
        assert (status.activity, status.goodput) == (None, None)
        assert main(["status", str(folder.path)]) == 0
        folder.seed_folder(3).mkdir()
        (folder.seed_folder(3) / "COMPLETE").touch()
        status = read_status(str(folder.path))
        assert (status.step, status.loss, status.tokens_per_second) == (300, 0.2, 2000)
        os.utime(folder.logs / "seed-2.jsonl", (0, now.timestamp() - 1))  # it waits: this command trains one at a time
        status = read_status(str(folder.path))
        assert (status.step, status.loss, status.tokens_per_second) == (300, 1.0, None)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown if line[0] in ("step", "time", "attempts")] == [
        ["step", "300", "of", "900"],
        ["time", "left", "10m00s"],
        ["attempts", "2"],
    ]
    assert read_status(str(folder.path)).seconds_left is None, "it has ended"
    for damaged in ("{", '{"run_id": "a", "ancestors": [], "attempts": [{"date": 5}]}'):
        folder.provenance.write_text(damaged)
        assert read_status(str(folder.path)).total_steps is None


def test_a_clock_that_is_set_back(folder: RunFolder) -> None:
    """Catches the figures of an earlier attempt, and a negative time left."""
    now = 1000.0

    def clock() -> float:
        return now

    with lock_run(folder):
        for total in (50, 60):
            timer = ActivityTimer(now, clock=clock, now=clock)
            timer.open(folder, step=0, total_steps=total)
            timer.begin_training()
            for step in range(1, 3):
                now += 2.0
                timer.finish_step(step)
                timer.record()
            now -= 500.0
        assert read_status(str(folder.path)).total_steps == 60
        timer.finish_step(3)
        timer.record()
        assert read_status(str(folder.path)).seconds_left is None


def test_the_time_left_of_a_budget(folder: RunFolder) -> None:
    """Catches a run with a time budget, whose last step is not known, without the time left."""
    now = 1000.0
    timer = ActivityTimer(990.0, clock=lambda: now, now=lambda: now)
    timer.open(folder, step=0, total_steps=None, seconds_left=60.0)
    now += 20.0
    with lock_run(folder), timer.during(CHECKPOINTING):
        assert read_status(str(folder.path)).seconds_left == 40.0


def test_a_folder_that_is_being_copied(folder: RunFolder) -> None:
    """Catches a traceback for files that are cut off or not there yet, and a run that has not started with a loss."""
    folder.config.write_text("schedule:\n  steps: 400\n")
    with lock_run(folder):
        assert (read_status(str(folder.path)).total_steps, read_status(str(folder.path)).seconds_left) == (400, None)
    write_events(folder, {"step": 10, "loss": 5.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 11, "lo')
    folder.launches.write_text('{"attempt": 1}\n{"atte')
    folder.outcome.write_text('{"outc')
    folder.owner.write_text('{"ho')
    folder.goodput.write_text('\n{"start": 1, "ti')
    folder.rank_record(0).write_text('{"rank"')
    folder.config.write_text("schedule:\n  steps: [4")
    status = read_status(str(folder.path))
    assert (status.state, status.step, status.loss, status.attempts) == ("unknown", 10, 5.0, 1)
    assert (status.total_steps, status.goodput) == (None, None)
