"""Makes the pictures of our pages in this folder: on a desktop and on a phone.

    export PYTHONPATH=tests/multiprocess:tests/unit/experiment/results
    python docs/images/screenshots.py reports
    deepcloze serve --model runs/sst2 &
    python docs/images/screenshots.py serve --text "a gorgeous , witty film"

Needs the extra `test` and Debian's chromium-driver.
"""

import io
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import fire
from PIL import Image
from sample_run import make_run
from selenium.webdriver import Chrome
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import presence_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

from experiment.local_server import bind
from experiment.results.report.followed_pages import FollowedPages
from experiment.results.report.page_server import PageServer
from experiment.results.report.pages import write_report
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import lock_run
from headless_chromium import start_browser

_REPORT_VIEWS = ((1180, 860, "light"), (390, 860, "dark"))
_SERVE_VIEWS = ((760, 380, "light"), (360, 380, "light"))
_RUNS = {"base": (20_000, 4e-4), "base-lr-5e-4": (20_000, 5e-4), "base-lr-8e-4": (9_000, 8e-4), "large": (6_000, 3e-4)}
_RUNNING = "large"
_HOVER = """
    const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
    const at = {clientX: box.left + box.width * 0.35, clientY: box.top + 90, bubbles: true};
    svg.dispatchEvent(new PointerEvent("pointermove", at));"""
_MARGIN, _GREY = 16, (208, 208, 208)


def reports() -> None:
    """Save report-page.png, the top of a report, and runs-page.png, that of several runs that are followed. The runs
    are made up."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        page = write_report(make_run(Path(folder) / "encoder-base", steps=20_000).path)
        _save("report-page.png", page.as_uri(), _REPORT_VIEWS, _hover)
        runs = Path(folder) / "runs"
        made = {name: make_run(runs / name, *values, seed) for seed, (name, values) in enumerate(_RUNS.items())}
        stack.enter_context(lock_run(made[_RUNNING]))
        listener = stack.enter_context(bind("127.0.0.1", 0))
        server = stack.enter_context(PageServer(listener, FollowedPages([RunFolder(runs)])))
        threading.Thread(target=server.serve_forever).start()
        stack.callback(server.shutdown)
        _save("runs-page.png", f"http://127.0.0.1:{server.server_address[1]}/", _REPORT_VIEWS, _hover)


def serve(text: str, url: str = "http://127.0.0.1:8000/") -> None:
    """Save serve-page.png, with a prediction for the text, of a running `deepcloze serve`."""

    def predict(driver: Chrome) -> None:
        _found(driver, "textarea").send_keys(text)
        _found(driver, "button").click()
        _found(driver, "#answer .row")

    _save("serve-page.png", url, _SERVE_VIEWS, predict)


def _hover(driver: Chrome) -> None:
    _found(driver, "path.line")
    if driver.current_url.startswith("http:"):
        _found(driver, ".live")
    driver.execute_script(_HOVER)


def _found(driver: Chrome, selector: str) -> WebElement:
    return WebDriverWait(driver, 60).until(presence_of_element_located(("css selector", selector)))


def _save(name: str, url: str, views: Sequence[tuple[int, int, str]], prepare: Callable[[Chrome], None]) -> None:
    """Save pictures of a page side by side. views: width, height and color scheme of each."""
    pictures = []
    with start_browser() as driver:
        driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        for width, height, scheme in views:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get(url)
            prepare(driver)
            pictures.append(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB"))
    width = sum(picture.width + _MARGIN for picture in pictures) + _MARGIN
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures) + 2 * _MARGIN), _GREY)
    left = _MARGIN
    for picture in pictures:
        sheet.paste(picture, (left, _MARGIN))
        left += picture.width + _MARGIN
    sheet.quantize(256).save(Path(__file__).with_name(name), optimize=True)


if __name__ == "__main__":
    fire.Fire({"reports": reports, "serve": serve})
