"""The page of `deepcloze report` in headless Chromium: what a user sees, and what the pointer shows."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from page_view import View
from sample_run import MARKUP, make_run

from experiment.results.page import (
    Bar,
    BarChart,
    BarCharts,
    ConfusionMatrix,
    Page,
    SeenText,
    SeenTexts,
    SeenToken,
    write_page,
)
from experiment.results.report.pages import write_overlay, write_report
from runs import soak


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, lr=lr).path for name, lr in (("base", 4e-4), ("<b>high", 8e-4))]
    return {"run": write_report(runs[0]), "overlay": write_overlay(runs, folder / "report")}


def test_the_pointer_shows_values(driver: Any, pages: dict[str, Path]) -> None:
    """Catches a page whose script fails, values of another step, and marks without their text."""
    view = View(driver, pages["run"])
    assert view.texts(".charts figcaption")[0].startswith("Loss")
    shown = view.hover(0, 0.5)
    step = int(re.match(r"step ([\d,]+)", shown)[1].replace(",", ""))  # type: ignore[index]
    assert 400 < step < 600
    assert re.search(r"training\s+[\d.]+\s+mean [\d.]+", shown)
    assert re.search(r"wikipedia\s+[\d.]+", shown)
    view.run("document.querySelector('.plot svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert view.run("return document.querySelector('.tip').hidden")
    assert view.texts(".marks .key") == ["restart × 2", "bad batch", "stage", "best checkpoint"]
    found = "".join(view.hover(0, share / 400) for share in range(100, 201))
    assert "step 350: the loss is nan" in found
    assert "attempt 2, 2026-11-20" in found
    view.check()


def test_the_axes_can_be_switched(driver: Any, pages: dict[str, Path]) -> None:
    """Catches buttons that do nothing, and tokens or times that are not those of the steps."""
    view = View(driver, pages["run"])
    assert view.texts("#units button") == ["step", "tokens", "time"]
    assert view.x_ticks() == ["200", "400", "600", "800", "1K"]
    view.click("tokens")
    assert view.x_ticks() == ["5M", "10M", "15M", "20M", "25M", "30M"]
    assert "tokens 32,768,000" in view.hover(0, 1)
    view.click("time")
    assert "1m" in view.hover(0, 1)
    before = view.run("return document.querySelector('.plot path').getAttribute('d')")
    view.click("log")
    assert view.run("return document.querySelector('.plot path').getAttribute('d')") != before
    assert view.run("return document.querySelector('.log').getAttribute('aria-pressed')") == "true"
    view.check()


def test_all_charts_are_drawn_in_time_that_is_linear(driver: Any, pages: dict[str, Path]) -> None:
    """Catches charts that each search all charts for the range of x: with 60 metrics, most of the time."""
    view = View(driver, pages["run"])
    searches = """
        const section = sections()[0], extent = section.extent.bind(section);
        let searches = 0;
        section.extent = () => { searches += 1; return extent(); };
        section.draw();
        delete section.extent;
        return [section.charts.length > 1, searches];
    """
    assert view.run(searches) == [True, 1]


def test_a_line_can_be_hidden_and_a_range_zoomed_to(driver: Any, pages: dict[str, Path]) -> None:
    """Catches legends and zooming that do not change the charts."""
    view = View(driver, pages["run"])
    lines = "return document.querySelector('.plot').querySelectorAll('path.line').length"
    before = view.run(lines)
    view.click("books", ".series")
    assert view.run(lines) == before - 1
    drag = """
        const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
        for (const [kind, share, buttons] of [["down", 0.4, 1], ["move", 0.6, 1], ["up", 0.6, 0]])
            svg.dispatchEvent(new PointerEvent(`pointer${kind}`,
                {clientX: box.left + box.width * share, pointerType: "mouse", button: 0, buttons, bubbles: true}));"""
    view.run(drag)
    first, *_, last = [int(tick) for tick in view.x_ticks()]
    assert 300 < first < last < 700
    view.run("document.querySelector('.plot svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert view.x_ticks()[-1] == "1K"
    view.check()


@pytest.mark.parametrize("page", ["run", "overlay"])
@pytest.mark.parametrize(("width", "media"), [(390, ""), (1280, ""), (720, "print")])
def test_layouts(driver: Any, pages: dict[str, Path], page: str, width: int, media: str) -> None:
    """Catches a page that is wider than a phone or a sheet of paper, charts without a size, and text as markup."""
    view = View(driver, pages[page], width, media=media)
    view.check()
    charts = view.run(
        "return [...document.querySelectorAll('.plot svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert charts
    assert all(min(280, width / 2 - 80) <= chart <= width for chart in charts)
    assert driver.title in ("base", "2 runs")
    if page == "run":
        assert MARKUP in "".join(view.texts(".filling p"))
    else:
        assert "<b>high" in view.texts("td")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(driver: Any, pages: dict[str, Path], scheme: str) -> None:
    """Catches colors of one scheme that are left in the other one. WCAG 2.1 asks for 4.5."""
    view = View(driver, pages["run"], scheme=scheme)
    background = view.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 60) == (scheme == "dark")
    view.check_contrast()
    view.check()


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [(2, "light"), (20, "dark"), (60, "light"), *soak((2, "dark"), (20, "light"), (60, "dark"))],
)
def test_a_confusion_matrix_can_be_read(driver: Any, tmp_path: Path, labels: int, scheme: str) -> None:
    """Catches text that is tiny, or has the color of its cell; cells without a color; and a page that is wider than a
    phone."""
    counts = [[9000 if row == column else row for column in range(labels)] for row in range(labels)]
    matrix = ConfusionMatrix([f"label {number}" for number in range(labels)], counts, "test")
    view = View(driver, write_page(tmp_path / "page.html", Page("Run", [matrix])), 390, scheme)
    view.check_contrast()
    colors = "return [...document.querySelectorAll('td')].map(cell => getComputedStyle(cell).backgroundColor)"
    first, second, *_ = view.run(colors)
    assert first != second
    size = "return parseFloat(getComputedStyle(document.querySelector('td')).fontSize)"
    assert view.run(size) >= 12
    assert ("9,000" in view.texts("td")) == (labels < 60)
    view.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bars_and_tokens_can_be_read(driver: Any, tmp_path: Path, scheme: str) -> None:
    """Catches bars without a width, tokens that stick out of a phone or are broken, and answers that cover tokens."""
    bars = BarCharts([BarChart("Tokens", [Bar("the", 0.2), Bar("of", 0.1)])])
    tokens = [SeenToken("[MASK]", "grateful") if number % 3 else SeenToken(f"word{number}") for number in range(60)]
    page = write_page(tmp_path / "page.html", Page("Corpus", [bars, SeenTexts([SeenText("document 1", tokens)])]))
    view = View(driver, page, 390, scheme)
    widths = view.run("return [...document.querySelectorAll('.bars i')].map(bar => bar.getBoundingClientRect().width)")
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[0] > 100
    heights = view.run(
        "return [...document.querySelectorAll('.tokens b')].map(token => token.getBoundingClientRect().height)"
    )
    assert max(heights) == min(heights) < 60
    view.check_contrast()
    view.check()


def test_runs_are_overlaid(driver: Any, pages: dict[str, Path]) -> None:
    """Catches runs that share a color, or are missing in a chart or in the table of differences."""
    view = View(driver, pages["overlay"])
    first = "document.querySelector('.charts figure')"
    names = view.run(f"return [...{first}.querySelectorAll('.series')].map(button => button.innerText)")
    assert sorted(names) == ["<b>high", "base"]
    strokes = view.run(f"return [...{first}.querySelectorAll('path')].map(path => path.style.stroke)")
    assert len(set(strokes)) == 2
    assert "optimizer.lr" in view.texts("th")
    assert {"0.0004", "0.0008"} <= set(view.texts("td"))
    view.check()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_comparison(driver: Any, tmp_path: Path, width: int) -> None:
    """Catches a legend with an entry for each seed, one that hides one of the seeds only, values that do not name their
    seed, and dots or ticks beyond their chart."""
    cells = {}
    for row, mean in (("random", 0.25), ("a row with a long name that no column of a phone has room for", 0.75)):
        folder = tmp_path / row / "toy"
        folder.mkdir(parents=True)
        events = [{"step": 10 * seed + step, "seed": seed, "loss": mean / step} for seed in (1, 2) for step in (1, 9)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
        scores = {"values": [mean - 0.1, mean + 0.1], "mean": mean, "std": 0.1, "interval": [mean - 0.2, mean + 0.25]}
        run = {"metric": "f1", "split": "test", "collapsed": 0, "folder": f"{row}/toy", "chosen": {}, "against": {}}
        cells[row] = {"toy": {**scores, **run}}
    (tmp_path / "compare.json").write_text(json.dumps(cells))
    (tmp_path / "runs.json").write_text(json.dumps({f"{row}/toy": {"state": "done"} for row in cells}))
    view = View(driver, write_report(tmp_path), width, scheme="dark")
    assert view.texts(".series") == list(cells)
    assert view.run("return document.querySelectorAll('.plot path.line').length") == 4
    assert re.search(r"random, seed 1\s+0.25\s+random, seed 2\s+0.25", view.hover(0, 0))
    view.click("random", ".series")
    assert view.run("return document.querySelectorAll('.plot path.line').length") == 2
    outside = """
        const chart = document.querySelector(".dots").getBoundingClientRect();
        return [...document.querySelectorAll(".dots *")].map(found => found.getBoundingClientRect())
            .filter(box => box.left < chart.left || box.right > chart.right || box.bottom > chart.bottom).length"""
    assert view.run(outside) == 0
    assert view.texts(".dots small") == ["0.0500 to 0.5000", "0.5500 to 1.0000"]
    view.check_contrast()
    view.check()


def test_it_prints_on_paper(driver: Any, pages: dict[str, Path]) -> None:
    """Catches a page that cannot be printed, also from dark mode, or only as hundreds of sheets."""
    view = View(driver, pages["run"], scheme="dark")
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.7})
    pdf = base64.b64decode(printed["data"])
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8
    view.check()


@pytest.mark.filterwarnings("ignore:overflow")  # of matplotlib
def test_values_of_any_size_are_drawn(driver: Any, tmp_path: Path) -> None:
    """Catches ticks without end, and positions that are no numbers: of one event, of zeros, of a run that diverged."""
    figures = {"loss": 2.0, "lr": 0.0, "grad_norm": 0.0, "tokens_per_second": 1e-3, "data_wait": 0.0}
    events = [{"step": step, "tokens": step, **figures, "eval/x/perplexity": 10.0 ** (30 * step)} for step in range(11)]
    for count in (1, 11):
        run = tmp_path / str(count)
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events[:count]))
        view = View(driver, write_report(run))
        for button in ("tokens", "time", "log"):
            for chart in range(len(view.texts(".plot svg"))):
                view.hover(chart, 0.5)
            if button in view.texts("button"):
                view.click(button)
        assert not re.search("NaN|Infinity|undefined", view.run("return document.querySelector('main').innerHTML"))
        view.check()


def test_without_javascript_the_page_says_so(driver: Any, pages: dict[str, Path]) -> None:
    """Catches charts that are empty silently where scripts do not run."""
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        View(driver, pages["run"])
        (hint,) = driver.find_elements("css selector", ".charts noscript p")
        assert hint.is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
