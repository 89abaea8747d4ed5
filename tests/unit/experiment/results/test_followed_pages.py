"""What the server of `deepcloze report --follow` reads and answers, without a server and a browser."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENT

from experiment.errors import UserError
from experiment.files import write_json
from experiment.results.history import History
from experiment.results.report import followed_pages
from experiment.results.report.followed_pages import (
    BackgroundWork,
    FollowedPage,
    FollowedPages,
    FollowedRun,
    Readers,
    Waits,
)
from experiment.run_files import metrics_file
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_life import Life
from experiment.run_files.run_lock import lock_run
from launcher.cli import main
from waiting import LIMIT, wait_until


def log(path: Path, *steps: int, **figures: Any) -> RunFolder:
    """A run that has logged these steps."""
    folder = open_run_folder(path)
    with folder.metrics.open("a") as file:
        for step in steps:
            event = {"step": step, "tokens": 9 * step, "tokens_per_second": 3.0, "loss": 1 / step, **figures}
            file.write(json.dumps(event) + "\n")
    return folder


class Browser:
    """What a browser has of a page."""

    def __init__(self, page: FollowedPage) -> None:
        self._page = page
        self.version = -1
        self.parts: dict[str, dict[str, Any]] = {}
        self.lines: dict[str, Any] = {}  # of the first chart of all, by name
        self.ask()

    def ask(self) -> dict[str, Any]:
        """Take over what has changed, as the script does, and return it: what each part has, and lines by name."""
        answer = json.loads(self._page.changes(self.version))
        self.version, self.title, self.time = answer["version"], answer["title"], answer["time"]
        self.parts = {part["key"]: self.parts.get(part["key"], {}) | part for part in answer["parts"]}
        changed = {part["key"]: sorted(part.keys() - {"key"}) for part in answer["parts"] if len(part) > 1}
        lines = [line for part in answer["parts"] if "data" in part for line in part["data"]["charts"][0]["lines"]]
        new = {line["label"]: line for line in lines if not isinstance(line, str)}
        if any("data" in part for part in answer["parts"]):
            self.lines = {name: new.get(name) or self.lines[name] for name in map(_name, lines)}
        return {"parts": changed, "lines": sorted(new)}

    @property
    def html(self) -> str:
        return "".join(part["html"] for part in self.parts.values())

    def curve(self, name: str) -> list[float]:
        return self.lines[name]["x"]


def _name(line: Any) -> str:
    return line if isinstance(line, str) else str(line["label"])


def test_an_answer_has_what_has_changed(tmp_path: Path) -> None:
    """Catches answers with everything, with nothing, or with all lines of all runs because one of them has grown."""
    a, b = (log(tmp_path / name, 1, 2) for name in "ab")
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    assert (browser.curve("a"), browser.curve("b")) == ([1, 2], [1, 2])
    assert browser.ask() == {"parts": {}, "lines": []}
    log(a.path, 3)
    changed = browser.ask()
    assert changed["lines"] == ["a"]
    assert sorted(changed["parts"].values()) == [["data"], ["html"]], "charts, and the table of runs"
    assert (browser.curve("a"), browser.curve("b")) == ([1, 2, 3], [1, 2])
    with lock_run(b):  # an answer does not wait for the state of a run that is known
        wait_until(lambda: bool(browser.ask()) and "running" in browser.html)
    write_outcome(b, Outcome.DONE)
    wait_until(lambda: bool(browser.ask()) and "running" not in browser.html)
    assert Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page("")).lines == browser.lines, "after a restart"


def test_runs_begin_resume_and_disappear(tmp_path: Path) -> None:
    """Catches a folder without runs that is refused, runs that are not found later, steps of a resumed run that stay,
    and an error for a run that was deleted."""
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    assert "There are no runs yet" in browser.html
    run = log(tmp_path / "a", 1, 2, 3, 4)
    log(tmp_path / "b", 1)
    browser.ask()
    assert (browser.curve("a"), browser.curve("b")) == ([1, 2, 3, 4], [1])
    run.metrics.unlink()
    log(run.path, 1, 2, 5)
    browser.ask()
    assert browser.curve("a") == [1, 2, 5]
    shutil.rmtree(run.path)
    browser.ask()
    assert list(browser.lines) == ["b"]
    assert 'data-run="a"' not in browser.html
    shutil.rmtree(tmp_path / "b")
    browser.ask()
    assert "There are no runs yet" in browser.html
    tmp_path.rmdir()
    browser.ask()
    assert "there is no run folder" in browser.html
    log(tmp_path / "c", 1)
    browser.ask()
    assert list(browser.lines) == ["c"]


def test_each_run_has_its_page(tmp_path: Path) -> None:
    """Catches links that lead nowhere, also after a restart of the server, and one out of the folder."""
    name = "lr=1e-4, 50 % <b>/of"
    log(tmp_path / "sweep" / name, 1, 2)
    write_json(tmp_path / "sweep" / "sweep.json", {"metric": "loss", "runs": {name: {"values": {"lr": "1e-4"}}}})
    log(tmp_path / "run", 3)
    (tmp_path / "other").mkdir()
    pages = FollowedPages([RunFolder(tmp_path)], PATIENT)
    html = Browser(pages.page("")).html
    quoted = "sweep%2Flr%3D1e-4%2C%2050%20%25%20%3Cb%3E%2Fof"
    for link in ("run/run", "run/sweep", f"run/{quoted}"):
        assert f'href="{link}"' in html
    run = Browser(pages.page(f"sweep/{name}"))
    assert run.curve("training") == [1, 2]
    assert 'href="../"' in run.html
    sweep = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page("sweep"))
    assert sweep.curve(name) == [1, 2]
    assert f'href="{quoted}"' in sweep.html, "beside this page"
    for missing in ("other", "..", "../x", "none"):
        assert pages.page(missing) is None
    first = Browser(FollowedPages([RunFolder(tmp_path / "run")], PATIENT).page(""))
    assert first.curve("training") == [3]
    assert "home" not in first.html
    several = Browser(FollowedPages([RunFolder(tmp_path / "run"), RunFolder(tmp_path / "sweep")], PATIENT).page(""))
    assert list(several.lines) == ["run", f"sweep/{name}"]


def test_a_run_that_begins_has_a_page(tmp_path: Path) -> None:
    """Catches a page that has to be opened again when its run logs the first time, evaluates, or is done, and one that
    counts a seed of an earlier config."""
    folder = open_run_folder(tmp_path)
    folder.config.write_text("training: {seeds: [7, 8]}\n")
    for seed in (6, 7):
        folder.seed_folder(seed).mkdir()
        (folder.seed_folder(seed) / "COMPLETE").touch()
    browser = Browser(FollowedPages([folder], PATIENT).page(""))
    assert "1<small>finished of 2" in browser.html
    assert browser.lines == {}
    log(tmp_path, 1, 2)
    browser.ask()
    assert browser.curve("training") == [1, 2]
    log(tmp_path, 2, **{"eval/wiki/loss": 1.5})
    browser.ask()
    assert "Held-out text" in browser.html
    scores = {"accuracy": {"values": [0.8], "mean": 0.8, "std": None, "median": 0.8}}
    write_json(tmp_path / "results.json", {"task": "t", "init": "i", "metric": "accuracy", "splits": {"test": scores}})
    browser.ask()
    assert "0.8000" in browser.html


def test_a_comparison_that_is_not_done(tmp_path: Path) -> None:
    """Catches a comparison that cannot be followed before it has scores, runs of two tasks in one chart, and the points
    of a grid that are missing."""
    write_json(tmp_path / "runs.json", {"base/sst2": {}, "base/cola": {}, "large/sst2": {}, "large/cola": {}})
    write_json(tmp_path / "large/sst2/sweep.json", {"metric": "loss", "runs": {"lr=1": {}, "lr=2": {}}})
    log(tmp_path / "base/sst2", 1)
    log(tmp_path / "large/sst2/lr=2", 1, 2)
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    assert list(browser.lines) == ["base", "large/lr=2"]
    assert "Training: sst2" in browser.html
    assert "Training: cola" not in browser.html
    log(tmp_path / "large/cola", 1)
    browser.ask()
    assert "Training: cola" in browser.html
    write_json(tmp_path / "compare.json", {})
    browser.ask()
    assert "when all runs are done" not in browser.html


@pytest.mark.parametrize("damage", ["{", '{"splits": 1}'])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a page that ends at a file that is being copied, and one that does not recover."""
    folder = log(tmp_path / "a", 1)
    (folder.path / "results.json").write_text(damage)
    (tmp_path / "sweep").mkdir()
    record = tmp_path / "sweep" / "sweep.json"
    record.write_text('{"runs": {"x": 1}}')
    pages = FollowedPages([RunFolder(tmp_path)], PATIENT)
    run, sweep = Browser(pages.page("a")), Browser(pages.page("sweep"))
    assert "results.json is damaged" in run.html
    assert run.curve("training") == [1]
    assert "sweep.json is damaged" in sweep.html
    (folder.path / "results.json").unlink()
    write_json(record, {"metric": "loss", "runs": {"x": {"values": {"lr": "1"}}}})
    run.ask()
    sweep.ask()
    assert "damaged" not in run.html + sweep.html


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until the event is set, the disk of the run `slow` does not answer, and answers wait for a moment only."""
    event, read = threading.Event(), History.read

    def slow_read(history: History, *arguments: Any) -> None:
        if history._folder.path.name == "slow":
            event.wait()
        read(history, *arguments)

    monkeypatch.setattr(History, "read", slow_read)
    yield event
    event.set()


def test_a_disk_that_does_not_answer(tmp_path: Path, held: threading.Event) -> None:
    """Catches runs that are not shown because another one cannot be read, pages that wait for it, and a time that is
    not that of its figures."""
    for path in (tmp_path / "a", tmp_path / "slow", tmp_path / "b", tmp_path / "more" / "slow", tmp_path / "c"):
        log(path, 1)
    waits = Waits(runs=0.01, page=LIMIT, stuck=0.01)
    browser = Browser(FollowedPages([RunFolder(tmp_path), RunFolder(tmp_path / "more")], waits).page(""))
    wait_until(lambda: browser.ask() and {"a", "b", "c"} == set(browser.lines))
    before = browser.time
    log(tmp_path / "a", 2)
    wait_until(lambda: browser.ask() and browser.curve("a") == [1, 2])
    assert browser.time == before
    assert 'data-run="slow"' in browser.html
    held.set()
    wait_until(lambda: browser.ask() and "slow" in browser.lines)
    wait_until(lambda: browser.ask() and browser.time > before)


def test_a_page_that_takes_long_is_shown_later(tmp_path: Path, held: threading.Event) -> None:
    """Catches a browser that waits for its page as long as the disk does not answer."""
    log(tmp_path / "slow", 1)
    page = FollowedPages([RunFolder(tmp_path / "slow")], Waits(runs=LIMIT, page=0.01, stuck=0.01)).page("")
    browser = Browser(page)
    assert (browser.title, "reading" in browser.html) == ("report", True)
    assert b"<header>" in page.html()
    held.set()
    wait_until(lambda: browser.ask() and "training" in browser.lines)
    assert browser.title == "slow"


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work that is never done, because too many threads were running when it was asked for first."""
    done: list[int] = []
    task = BackgroundWork(lambda: done.append(1))

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patches:
        patches.setattr(threading.Thread, "start", refuse)
        assert task.ask().is_set()
    task.ask()
    wait_until(lambda: done == [1])


def test_readers_take_turns_unless_they_are_stuck() -> None:
    """Catches many files that are read at a time, which takes gigabytes, and readers that wait forever."""
    readers, inside, most, ready = Readers(stuck_seconds=LIMIT), [0], [0], threading.Event()

    def read() -> None:
        with readers.slot():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            ready.wait()
            inside[0] -= 1

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: inside[0] == 2)
    ready.set()
    for thread in threads:
        thread.join()
    assert most == [2]
    stuck = Readers(stuck_seconds=0.01)
    with stuck.slot(), stuck.slot(), stuck.slot():
        pass


def test_only_new_lines_are_read_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that reads whole files again and again, or works while no page is open."""
    folder, read = log(tmp_path, *range(1, 2000)), list[int]()
    parse = metrics_file._parse
    monkeypatch.setattr(metrics_file, "_parse", lambda lines: read.append(len(lines)) or parse(lines))
    threads = threading.active_count()
    pages = FollowedPages([folder], PATIENT)
    page = pages.page("")
    assert (read, threading.active_count()) == ([], threads)
    browser = Browser(page)
    assert sum(read) > 100_000
    read.clear()
    log(tmp_path, 2000)
    assert read == []
    browser.ask()
    assert sum(read) < 100
    wait_until(lambda: threading.active_count() == threads)


def test_the_newest_runs_are_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches charts, which show the newest runs, that wait until all others are read."""
    for name, start in (("a", 2), ("b", 3), ("c", 1)):
        folder = log(tmp_path / name, 1)
        folder.config.write_text("{}")
        os.utime(folder.config, (start, start))
    asked, ask = list[str](), FollowedRun.ask
    monkeypatch.setattr(FollowedRun, "ask", lambda run: asked.append(run._folder.path.name) or ask(run))
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    assert asked == ["b", "a", "c"]
    assert browser.lines.keys() == {"a", "b", "c"}


def test_a_silent_run_on_another_machine_does_not_hold_up_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches answers that take as long as it takes to find out whether another machine is alive."""
    log(tmp_path, 1)
    observed, release = threading.Event(), threading.Event()

    def read_life(_: RunFolder) -> Life:
        if observed.is_set():
            release.wait()
        observed.set()
        return Life("unknown", "node-1", "silent")

    monkeypatch.setattr(followed_pages, "read_life", read_life)
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    assert "unknown" in browser.html
    log(tmp_path, 2)
    browser.ask()
    assert browser.curve("training") == [1, 2]
    release.set()


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that dies of a disk error, after which a page never changes."""
    log(tmp_path, 1)
    browser = Browser(FollowedPages([RunFolder(tmp_path)], PATIENT).page(""))
    monkeypatch.setattr(followed_pages, "run_blocks", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    browser.ask()
    assert "cannot be read" in browser.html
    assert "Input/output error" in browser.html
    monkeypatch.undo()
    monkeypatch.setattr(History, "read", lambda *_: (_ for _ in ()).throw(UserError("lost")))
    browser.ask()
    assert "lost" in browser.html


def test_a_name_that_is_not_utf_8_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where a folder with such a name is in a folder of runs."""
    log(tmp_path / "runs" / os.fsdecode(b"\xfcbung"), 1)
    browser = Browser(FollowedPages([RunFolder(tmp_path / "runs")], PATIENT).page(""))
    assert "\\xfcbung&#39; is not UTF-8" in browser.html
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert "\\xfcbung' is not UTF-8" in capsys.readouterr().err
