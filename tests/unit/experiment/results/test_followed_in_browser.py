"""The page of `deepcloze report --follow` in headless Chromium, beside runs that log."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_view import View
from patience import PATIENT
from sample_run import make_run

from experiment.local_server import bind
from experiment.results.report import page_server
from experiment.results.report.followed_pages import FollowedPages
from experiment.results.report.page_server import PageServer
from experiment.run_files.metrics_file import read_events
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from runs import soak
from waiting import wait_until

Serve = Callable[..., str]


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[str]:
    with (
        bind("127.0.0.1", port) as listener,
        PageServer(listener, FollowedPages([RunFolder(folder)], PATIENT)) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def serve(driver: Any) -> Iterator[Serve]:
    """Starts servers: serve(folder)."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(served(folder))
        driver.get("about:blank")


def log(path: Path, *steps: int, **figures: Any) -> RunFolder:
    folder = open_run_folder(path)
    with folder.metrics.open("a") as file:
        for step in steps:
            event = {"step": step, "tokens": 100 * step, "tokens_per_second": 50.0, "loss": 9 - step / 100, **figures}
            file.write(json.dumps(event) + "\n")
    return folder


def show_news(view: View) -> None:
    """Let the page ask its server now, as when its tab is shown again, and wait until it has taken over two answers:
    the first one may have been on its way."""
    view.run("window.before = takeOver; window.news = 0; takeOver = answer => { before(answer); window.news += 1; }")
    wait_until(lambda: view.run("document.dispatchEvent(new Event('visibilitychange')); return news") > 1)
    view.run("takeOver = before")


def names(view: View) -> list[str]:
    return [
        row.strip()
        for row in view.run(
            "return [...document.querySelectorAll('tr[data-run]:not([hidden])')].map(row => row.dataset.run)"
        )
    ]


def lines(view: View) -> int:
    return int(view.run("return document.querySelector('.plot').querySelectorAll('path.line').length"))


def press(view: View, *keys: str, shift: bool = False) -> None:
    for key in keys:
        at = {"key": key, "code": key, "modifiers": 8 if shift else 0}
        text = {" ": " ", "Enter": "\r"}.get(key, key if len(key) == 1 else "")
        view.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", "text": text, **at})
        view.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **at})


def test_the_page_of_a_run_stays_current(driver: Any, serve: Serve, tmp_path: Path) -> None:
    """Catches a page that has to be reloaded, or that loses what its user has chosen when there are new points."""
    run = log(tmp_path / "run", *range(10, 210, 10))
    run.config.write_text("run: {seed: 1}\n")
    log(run.path, 200, **{"eval/wiki/loss": 3.0, "eval/books/loss": 4.0})
    view = View(driver, serve(tmp_path / "run"))
    view.run("window.marker = 1")
    assert view.texts("figcaption") == ["Losslog", "Tokens per second, all ranks, without paddinglog"]
    view.click("books", ".series")
    view.click("tokens")
    view.click("log")
    view.run("document.querySelector('summary').click()")
    view.run("sections()[0].zoomTo([5000, 15000])")
    view.hover(0, 0.5)
    log(run.path, *range(210, 310, 10), **{"eval/wiki/accuracy": 0.5})
    run.checkpoints.mkdir()
    write_outcome(run, Outcome.DONE)
    show_news(view)
    assert view.texts(".state") == ["done"]
    assert "300" in view.texts("dd")
    assert view.texts("figcaption")[:2] == ["Losslog", "Accuracy on held-out text"], "a chart is new"
    chosen = "#units button[aria-pressed=true]", ".series[aria-pressed=false] span"
    assert [view.texts(selector) for selector in chosen] == [["tokens"], []]
    show_news(view)
    assert view.run("return [window.marker, document.querySelector('details').open]") == [1, True]
    view.run("sections()[0].zoomTo([5000, 15000])")
    view.click("books", ".series")
    log(run.path, 310)
    view.hover(0, 0.5)
    show_news(view)
    assert "310" in view.texts("dd")
    assert view.x_ticks()[0] == "6K"
    assert view.texts(".series[aria-pressed=false] span") == ["books"]
    assert "tokens 10,000" in view.run("return document.querySelector('.tip').innerText")
    assert "training 5.9" in view.run("return document.querySelector('.plot svg').getAttribute('aria-label')")
    assert view.texts(".live")[0].startswith("as of ")
    view.check()


def test_runs_appear_and_disappear(driver: Any, serve: Serve, tmp_path: Path) -> None:
    """Catches a page without charts that never gets any, parts in the wrong order, and a row that stays."""
    view = View(driver, serve(tmp_path))
    assert "There are no runs yet." in view.texts("p")
    log(tmp_path / "b", 10, 20)
    show_news(view)
    assert (names(view), lines(view)) == (["b"], 1)
    assert view.texts("#units button") == ["step", "tokens", "time"]
    log(tmp_path / "a", 10, 20, 30)
    show_news(view)
    assert (names(view), lines(view)) == (["a", "b"], 2)
    assert (
        view.run("return document.querySelector('.runs').getBoundingClientRect().top")
        < view.run("return document.querySelector('#units').getBoundingClientRect().top")
        < view.run("return document.querySelector('.charts').getBoundingClientRect().top")
    )
    assert view.x_ticks()[-1] == "30"
    shutil.rmtree(tmp_path / "a")
    show_news(view)
    assert (names(view), lines(view)) == (["b"], 1)
    view.click("b", "a")
    wait_until(lambda: view.texts("h1") == ["b"])
    view.click("all runs", "a")
    wait_until(lambda: names(view) == ["b"])
    view.check()


def test_a_server_that_ends_and_comes_back(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that hides that it is old, and one that has to be reloaded after its server was restarted, because
    it waits forever or its charts are empty."""
    monkeypatch.setattr(page_server._Handler, "protocol_version", "HTTP/1.0")  # connections end, as with a process
    log(tmp_path / "run", 10)
    with served(tmp_path / "run") as url:
        view = View(driver, url)
        wait_until(lambda: view.texts(".live"))
    view.run("document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: "no answer from the server" in view.texts(".live")[0])
    assert view.texts(".live")[0].startswith("as of ")
    log(tmp_path / "run", 20)
    with served(tmp_path / "run", int(url.split(":")[2].strip("/"))):
        show_news(view)
        assert "20" in view.texts("dd")
        assert lines(view) == 1
        wait_until(lambda: "no answer" not in view.texts(".live")[0])
        driver.get("about:blank")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 runs with 100,000 log events in all."""
    folder, draw = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for number in range(50):
        run = open_run_folder(folder / f"run-{number}")
        noise = draw.normal(0.0, 0.01, (2000, 2)).tolist()
        with run.metrics.open("w") as file:
            for step, (first, second) in enumerate(noise, start=1):
                loss, speed = number / 10 + 9 / step + first, 9e5 * (1 + second)
                file.write(
                    f'{{"step": {step}, "tokens": {step * 4096}, "loss": {loss}, "lr": {1 / step}, "grad_norm": '
                    f'{abs(second)}, "tokens_per_second": {speed}, "mfu": null, "data_wait": {abs(first)}}}\n'
                )
            file.write(f'{{"step": 2000, "eval/wiki/loss": {number / 10}, "eval/wiki/accuracy": 0.5}}\n')
    return folder


@pytest.fixture(scope="module")
def url_of_many(many: Path) -> Iterator[str]:
    """Of a server that reads `many` once."""
    with served(many) as url:
        yield url


def test_fifty_runs(driver: Any, url_of_many: str, many: Path) -> None:
    """Catches a first picture without runs or curves, one that takes much longer than to parse the logs twice, and an
    update that sends everything."""
    start = time.process_time()
    for path in many.glob("*/metrics.jsonl"):
        read_events(path)  # the speeds of the two parsers differ by version
        for line in path.read_text().splitlines():
            json.loads(line)
    parsed = time.process_time()
    view = View(driver, url_of_many)
    shown = time.process_time()
    print(f"{parsed - start:.2f} s of the processor to parse, {shown - parsed:.2f} s until the page is shown")
    assert shown - parsed < 2 * (parsed - start), "a limit in seconds would fail on a slow machine"
    assert len(names(view)) == 50
    assert lines(view) == 2 * 21, "with their averages"
    assert "50 runs, 21 in the charts" in view.texts(".filter span")
    sizes = "return performance.getEntries().filter(each => each.name.includes('since')).map(each => each.transferSize)"
    wait_until(lambda: view.run(sizes))
    log(many / "run-7", 2001, loss=0.7)
    show_news(view)
    page, *news = view.run("return performance.getEntriesByType('navigation')[0].transferSize"), *view.run(sizes)
    assert max(news) < page / 10, (page, news)
    view.click("time")
    assert view.x_ticks()
    view.check()


def test_a_table_of_runs(driver: Any, url_of_many: str, many: Path) -> None:
    """Catches rows that are sorted as text, a filter that shows others, boxes that change other lines, and an update
    that undoes what the user has chosen."""
    view = View(driver, url_of_many)
    view.click("training loss", "th button")
    assert names(view)[:3] == ["run-0", "run-1", "run-2"]
    view.click("training loss", "th button")
    assert names(view)[:3] == ["run-49", "run-48", "run-47"]
    view.click("run", "th button")
    assert names(view)[8:11] == ["run-8", "run-9", "run-10"]
    assert view.run("return document.querySelector('[aria-sort=ascending]').innerText") == "run"
    type_in = "const box = document.querySelector('[type=search]'); box.value = arguments[0]; box.oninput()"
    view.run(type_in, "RUN-1")
    assert names(view) == ["run-1", *(f"run-{number}" for number in range(10, 20))]
    check = "document.querySelectorAll('.runs input')[arguments[0]].click()"
    view.run(check, 0)  # all: those of the filter
    view.run(type_in, "")
    before = view.texts(".filter span")
    view.run(type_in, "run-3")
    log(many / "run-3", 2002, loss=-50.0)
    show_news(view)
    assert names(view) == ["run-3", *(f"run-{number}" for number in range(30, 40))]
    assert "-50.0000" in view.texts("td")
    view.run(type_in, "")
    assert view.texts(".filter span") == before
    assert names(view)[8:11] == ["run-8", "run-9", "run-10"]
    drawn, shown = lines(view), int(before[0].split(",")[1].split()[0])
    assert drawn == 2 * shown
    row = "[...document.querySelectorAll('tr[data-run]')].find(row => row.dataset.run === 'run-12')"
    view.run(f"{row}.querySelector('input').click()")
    assert lines(view) == drawn - 2
    view.check()


def test_the_keyboard(driver: Any, url_of_many: str, many: Path) -> None:
    """Catches what only a mouse can do, a chart that swallows keys of the browser, and a focus that an update moves."""
    view = View(driver, url_of_many)
    focused = "return document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    press(view, "Tab", "8")
    assert len(names(view)) == 5
    press(view, "Tab", "Tab", "Enter")
    assert view.run(focused) == "run"
    assert view.run("return document.activeElement.parentElement.ariaSort") == "ascending"
    view.run("document.querySelector('tr[data-run]:not([hidden]) input').focus()")
    label, drawn = view.run(focused), lines(view)
    press(view, " ")
    assert abs(lines(view) - drawn) == 2
    log(many / "run-8", 2003, loss=0.8)
    show_news(view)
    assert view.run(focused) == label
    view.run("document.querySelector('.plot svg').focus()")
    press(view, "ArrowRight")
    assert "step 1,0" in view.run("return document.querySelector('.tip').innerText")
    press(view, "End")
    end = view.run("return document.querySelector('.tip').innerText")
    press(view, "ArrowLeft", shift=True)
    assert view.run("return document.querySelector('.tip').innerText") != end
    before = view.x_ticks()
    press(view, "+")
    assert view.x_ticks() != before
    press(view, "Escape")
    assert view.x_ticks() == before
    press(view, "Tab")
    assert view.run("return document.querySelector('.tip').hidden")
    view.check()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark"), *soak((390, "dark"), (1280, "light"))])
def test_layouts(driver: Any, serve: Serve, tmp_path: Path, width: int, scheme: str) -> None:
    """Catches a page that is wider than a phone, texts that cannot be read in one of the schemes, and charts that are
    far below a long table."""
    for number in range(12):
        log(tmp_path / f"a long name of a run without end number {number}", 10, 20, **{"eval/wikipedia/loss": 1.0})
    make_run(tmp_path / "run", steps=100)
    view = View(driver, serve(tmp_path), width, scheme)
    wait_until(lambda: view.texts(".live"))
    view.check_contrast()
    assert view.run("return document.querySelector('.charts').getBoundingClientRect().top") < 700
    view.check()
