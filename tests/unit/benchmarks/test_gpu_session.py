"""`benchmarks.gpu_session` with jobs that stand in for those on a GPU."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from _pytest.mark.expression import Expression

from benchmarks import gpu_session
from benchmarks.gpu_session import CASES, MORE_TO_DO, Job, Session, next_job, plan, run_session, select
from benchmarks.gpu_training import parse_case
from experiment.errors import UserError
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
GPU = 'print(\'FIGURES {"gpu": "stand-in", "commit": "0123456789"}\')'
HANG = "import threading; threading.Event().wait()"


def job(name: str, code: str = "", seconds: int = 60, expected: int | None = None) -> Job:
    """A job that gives figures when its code has ended."""
    code = "; ".join(filter(None, (code, "print('FIGURES {}')")))
    return Job(name, seconds, seconds if expected is None else expected, ("-c", code))


def environment(code: str) -> Job:
    return Job("environment", 60, 60, ("-c", code))


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU."""
    monkeypatch.setattr(gpu_session, "ENVIRONMENT", environment(GPU))


def statuses(folder: Path) -> dict[str, str]:
    saved = json.loads((folder / "session.json").read_text(encoding="utf-8"))
    return {name: outcome["status"] for name, outcome in saved.items() if name != "environment"}


def test_each_step_is_recorded_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a job that hangs or crashes and takes the others with it, processes that it leaves, figures that it had
    printed before, JSON of libraries among them, and a job that ends early without an error."""
    monkeypatch.setattr(gpu_session, "_GRACE", 30.0)
    orphan = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {HANG!r}]).pid)"
    jobs = [
        job("fails", "raise SystemExit('broken')"),
        job("crashes", "import os; os.abort()"),
        job("hangs", f"print('FIGURES {{\"case\": 7}}', flush=True); {HANG}", seconds=3),
        job("leaves", orphan),
        job("works", "print('{\"case\": 8}')"),
        job("gives nothing", "raise SystemExit"),
    ]
    assert run_session(tmp_path, 9, jobs) == 1
    found = statuses(tmp_path)
    assert found == {
        "fails": "failed",
        "crashes": "failed",
        "hangs": "timed out",
        "leaves": "passed",
        "works": "passed",
        "gives nothing": "failed",
    }
    outcomes = Session(tmp_path).outcomes
    assert (outcomes["works"].figures, outcomes["works"].commit) == ([{}], "0123456789")
    assert outcomes["crashes"].exit_code == -signal.SIGABRT
    assert outcomes["hangs"].figures[0] == {"case": 7}
    assert "most recent call first" in outcomes["hangs"].output, "no stacks"
    page = (tmp_path / "RESULTS.gpu.md").read_text(encoding="utf-8")
    assert "### fails" in page
    assert "broken" in page
    log = (tmp_path / "session.log").read_text(encoding="utf-8")
    pid = int(log.partition("===== leaves")[2].split("\n")[1])
    wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_second_call_continues(tmp_path: Path) -> None:
    """Catches jobs that run twice, and time that is not used for a short job when a long one no longer fits."""
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    jobs = [job("short", count, 20), job("long", "", 200), job("short too", count, 20)]
    assert run_session(tmp_path, 1, jobs) == MORE_TO_DO
    assert statuses(tmp_path) == {"short": "passed", "short too": "passed"}
    assert run_session(tmp_path, 9, jobs) == 0
    assert statuses(tmp_path)["long"] == "passed"
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "xx"


def test_the_next_step_fits_into_the_time_left() -> None:
    """Catches a job that the end of the time would cut off and record as hung."""
    jobs = [job("a", seconds=100), job("b", seconds=50)]
    assert [getattr(next_job(jobs, left), "name", None) for left in (200, 100, 60, 50)] == ["a", "b", "b", None]
    quick = [job("c", seconds=100, expected=20)]
    assert (next_job(quick, 60), next_job(quick, 60, {"c"})) == (quick[0], None)


def test_the_end_of_the_time_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a minute or two at the end of each call in which nothing runs, and a job that counts as hung there."""
    monkeypatch.setattr(gpu_session, "_GRACE", 0.1)
    hanging = job("hangs", f"print('FIGURES {{\"case\": 7}}', flush=True); {HANG}", seconds=60, expected=1)
    assert run_session(tmp_path, 5 / 60, [hanging]) == MORE_TO_DO
    outcome = Session(tmp_path).outcomes["hangs"]
    assert (outcome.status, outcome.has_failed, outcome.figures) == ("interrupted", False, [{"case": 7}])


def test_selected_jobs_run_in_the_order_given() -> None:
    """Catches a short session that spends its time on other jobs, and a typo that runs nothing."""
    jobs = [job("kernels"), job("mfu-base"), job("mfu-large"), job("mfus")]
    assert [one.name for one in select(jobs, ["mfu-", "kernels", "mfu"])] == [
        "mfu-base",
        "mfu-large",
        "kernels",
        "mfus",
    ]
    assert select(jobs, [""]) == jobs
    assert select([job("compile"), job("compiled-layers")], ["compile"]) == [job("compile")]
    with pytest.raises(UserError, match="--only profile: no such job; the jobs are kernels, mfu-base"):
        select(jobs, ["kernels", "profile"])


@pytest.mark.parametrize(
    ("found", "code", "message"),
    [
        ("print('FIGURES {\"gpu\": null}')", MORE_TO_DO, "this machine has no GPU"),
        ("raise SystemExit('broken')", 1, "environment failed, so that no other job has run"),
    ],
)
def test_jobs_wait_for_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: str,
    code: int,
    message: str,
) -> None:
    """Catches jobs that fail, or measure the CPU, for want of a GPU that works, and ones that do not run later."""
    with monkeypatch.context() as without:
        without.setattr(gpu_session, "ENVIRONMENT", environment(found))
        assert run_session(tmp_path, 9, [job("any")]) == code
    assert statuses(tmp_path) == {}
    assert message in capsys.readouterr().out
    assert run_session(tmp_path, 9, [job("any")]) == 0
    assert statuses(tmp_path) == {"any": "passed"}


def test_a_gpu_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a call that is lost because the driver was not ready."""
    ready = tmp_path / "ready"
    code = (
        f"from pathlib import Path; ready = Path({str(ready)!r}); old = ready.exists(); ready.touch(); 1 / old; {GPU}"
    )
    monkeypatch.setattr(gpu_session, "ENVIRONMENT", environment(code))
    assert run_session(tmp_path, 9, [job("any")]) == 0


def test_steps_can_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a job whose failure stays although it has been fixed."""
    fixed = tmp_path / "fixed"
    jobs = [job("broken", f"open({str(fixed)!r})", seconds=50), job("works")]
    assert run_session(tmp_path, 9, jobs) == 1
    fixed.touch()
    assert run_session(tmp_path, 9, jobs) == 1
    assert run_session(tmp_path, 9, jobs, ["failed"]) == 0
    assert run_session(tmp_path, 9, jobs, ["wor"]) == 0
    with pytest.raises(UserError, match="--again none: no such job; the jobs are broken, works"):
        run_session(tmp_path, 9, jobs, ["none"])
    assert run_session(tmp_path, 9, jobs, ["failed"]) == 0
    assert "--again failed: no job has failed" in capsys.readouterr().out


def test_a_job_that_has_not_run_yet_can_be_asked_for_again(tmp_path: Path) -> None:
    """Catches an exit code of 2 for it, and another job of the same beginning that runs in its place."""
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    jobs = [job("compile"), job("compiled-layers", count)]
    assert run_session(tmp_path, 9, jobs, only=["compiled-layers"]) == 0
    assert run_session(tmp_path, 9, jobs, ["compile"]) == 0
    assert statuses(tmp_path) == {"compiled-layers": "passed", "compile": "passed"}
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "x"


def test_figures_outlive_another_run_of_their_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches figures that are deleted before there are new ones, and those of two commits that are mixed up."""
    number = tmp_path / "number"
    number.write_text("1")
    figures = f"print('FIGURES {{\"ms\": %s}}' % open({str(number)!r}).read())"
    jobs = [Job("kernel-times", 60, 60, ("-c", figures))]
    assert run_session(tmp_path, 9, jobs) == 0
    monkeypatch.setattr(gpu_session, "ENVIRONMENT", environment(GPU.replace("0123456789", "abcdef")))
    number.write_text("2")
    assert run_session(tmp_path, 0, jobs, ["kernel"]) == MORE_TO_DO
    first = {"commit": "0123456789", "ms": 1}
    assert Session(tmp_path).outcomes["kernel-times"].measured == [first]
    assert run_session(tmp_path, 9, jobs) == 0
    assert Session(tmp_path).outcomes["kernel-times"].measured == [first, {"commit": "abcdef", "ms": 2}]


def test_a_page_that_cannot_be_written_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mistake in the page that ends the session, and jobs that do not run because of it."""
    (tmp_path / "RESULTS.gpu.md").mkdir()
    assert run_session(tmp_path, 9, [job("any")]) == 0
    assert statuses(tmp_path) == {"any": "passed"}
    assert "RESULTS.gpu.md was not written" in capsys.readouterr().out


def test_a_full_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback."""

    def write_json(path: Path, _: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(gpu_session, "write_json", write_json)
    assert gpu_session.main(["--results", str(tmp_path)]) == 2
    assert "session.json: disk full" in capsys.readouterr().err


@pytest.mark.parametrize(("again", "code"), [(["a", "b"], 0), (["failed"], 1)])
def test_jobs_run_again_in_several_calls(tmp_path: Path, again: list[str], code: int) -> None:
    """Catches a loop over the same command that repeats the first jobs forever and never the last."""
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')" + code * "; raise SystemExit(1)"
    jobs = [job("a", count, 20), job("b", count, 200)]
    assert run_session(tmp_path, 9, jobs) == code
    assert run_session(tmp_path, 1, jobs, again) == MORE_TO_DO
    assert run_session(tmp_path, 9, jobs, again) == code
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "xxxx"


def test_jobs_that_are_cut_off_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches jobs that are not repeated because an earlier call was cut off in one of them, and ones that are repeated
    forever because each call is cut off in the last."""
    monkeypatch.setattr(gpu_session, "_GRACE", 0.1)
    session = Session(tmp_path)
    for found in (["waiting", "waiting"], ["passed", "interrupted"]):
        session.run(job("a"))
        session.run(job("b", HANG), left=0.1)
        session = Session(tmp_path)
        session.forget(["a", "b"], [job("a"), job("b")])
        assert [outcome.status for outcome in session.outcomes.values()] == found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_session_continues(tmp_path: Path, number: signal.Signals) -> None:
    """Catches a job that trains on beside the next session, one that ends every session, and figures that are lost."""
    hang = "print('FIGURES {}', flush=True); import os; "
    hang += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {HANG}"
    code = f"""if True:
        import sys
        from benchmarks import gpu_session
        from benchmarks.gpu_session import Job
        gpu_session.ENVIRONMENT = Job('environment', 60, 60, ('-c', {GPU!r}))
        gpu_session.plan = lambda: [Job('ends the session', 60, 60, ('-c', {hang!r}))]
        sys.exit(gpu_session.main(['--results', {str(tmp_path)!r}]))"""
    for _ in range(2):
        (tmp_path / "pid").unlink(missing_ok=True)
        session = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(encoding="utf-8"), session)
        pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
        session.send_signal(number)
        session.wait()
        wait_for_end(pid)
    outcome = Session(tmp_path).outcomes["ends the session"]
    assert (outcome.status, outcome.attempts, outcome.figures) == ("interrupted", 2, [{}])
    assert outcome.is_final


def test_all_steps_of_a_session_exist() -> None:
    """Catches a case, file of tests or module that was renamed, a job too long for any call, two of one name, and cases
    that are measured before they are compiled, or after an hour of tests."""
    jobs = list(plan())
    names = [one.name for one in jobs]
    assert names.index("compile") < names.index(f"mfu-{CASES[0]}") < names.index("training")
    assert all(one.expected <= one.seconds for one in jobs)
    assert len({one.name for one in jobs}) == len(jobs) > len(CASES)
    assert [parse_case(case).name for case in CASES] == list(CASES)
    (compiled,) = [one.command[3:] for one in jobs if one.name == "compile"]
    assert set(compiled) < set(CASES)
    assert {next_job([one], 9 * 60 - 30, names) for one in jobs} == set(jobs)
    for one in jobs:
        module = one.command[1].replace(".", "/") + ".py"
        files = [argument for argument in one.command if argument.startswith("tests/")]
        assert all((ROOT / file).exists() for file in (files or [module])), one


def test_a_job_without_a_watchdog_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a job that runs on where no more processes can be started."""
    started = []

    def watchdog(group: int) -> NoReturn:
        started.append(psutil.Process(group))
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(gpu_session, "watchdog", watchdog)
    monkeypatch.setattr(gpu_session, "ENVIRONMENT", environment(HANG))
    with pytest.raises(OSError, match="unavailable"):
        run_session(tmp_path, 9, [job("any")])
    assert not any(process.is_running() for process in started)


def test_results_of_tests_are_kept_although_pytest_dies(tmp_path: Path) -> None:
    """Catches messages that pytest would print at its end, and results that each process of xdist prints too."""
    tests = ["import os", "def test_a(): pass", "def test_b(): assert 1 == 2, 'one'"]
    (tmp_path / "test_three.py").write_text("\n".join([*tests, "def test_c(): os.kill(os.getppid(), 9)"]))
    plugins = ("-p", "benchmarks.gpu_test_reports", "-p", "no:cacheprovider", "-p", "no:schemathesis")
    options = ("-n", "1", *plugins, f"--rootdir={tmp_path}")
    command = ("-m", "pytest", str(tmp_path / "test_three.py"), *options)
    assert run_session(tmp_path, 90, [Job("tests", 600, 600, command)]) == 1
    outcome = Session(tmp_path).outcomes["tests"]
    assert outcome.exit_code == -signal.SIGKILL
    results = [(figures["test"][-6:], figures["result"]) for figures in outcome.figures]
    assert results == [("test_a", "passed"), ("test_b", "failed")]
    assert outcome.figures[1]["message"].startswith("AssertionError: one")


def test_every_gpu_test_is_in_one_step() -> None:
    """Catches tests that no job selects, or two do."""
    selected: list[str] = []
    for one in plan():
        if one.command[1] == "pytest":
            expression = Expression.compile(one.command[one.command.index("-k") + 1] or "test")
            files = [argument for argument in one.command if argument.startswith("tests/")]
            tests = [test for file in files for test in gpu_tests(ROOT / file)]
            selected += [test for test in tests if expression.evaluate(lambda part, test=test, **_: part in test)]
    assert sorted(selected) == sorted(test for file in (ROOT / "tests/gpu").glob("*.py") for test in gpu_tests(file))


def gpu_tests(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
