import json
from pathlib import Path

import pytest

from experiment.outcome_file import Cause, Outcome, write_outcome
from experiment.run_folder import open_run_folder
from experiment.run_lock import lock_run
from launcher.cli import main


def make_run(path: Path) -> str:
    open_run_folder(path).metrics.write_text('{"step": 1200, "loss": 3.25, "tokens_per_second": 45678.9}\n')
    return str(path)


def test_one_run_is_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures that are missing, and a failure without its reason."""
    run = make_run(tmp_path / "first")
    write_outcome(open_run_folder(run), Outcome.FAILED, "rank 1 was killed", Cause.KILLED)
    assert main(["status", run]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = "state failed", "step 1,200", "loss 3.2500", "tokens/s 45,679", "restarts 0", "rank 1 was killed"
    assert [text.split() for text in expected if text.split() not in lines] == []


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
    assert main(["status"]) == 2
    assert "missing: RUN…" in capsys.readouterr().err


def test_folders_that_are_no_runs_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `status runs/*` that fails because there is a sweep or a report, and one that hides a misspelled run."""
    (tmp_path / "report").mkdir()
    run, report = make_run(tmp_path / "a"), str(tmp_path / "report")
    assert main(["status", run, report, "--json"]) == 0
    captured = capsys.readouterr()
    assert [status["run"] for status in json.loads(captured.out)] == [run]
    assert captured.err == f"deepcloze: {report} is skipped: it is not a run folder\n"
    assert main(["status", report, report]) == 2
    assert "report is not a run folder" in capsys.readouterr().err
