"""Makes docs/images/report-page.png, the top of a report, and runs-page.png, that of several runs that are followed:
on a desktop and on a phone in dark mode.

    PYTHONPATH=tests/unit/experiment/results python docs/images/report_page.py

Needs the extra `test` and Debian's chromium-driver. The runs are made up.
"""

import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image
from sample_run import make_run
from screenshots import chromium, save_side_by_side
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from experiment.local_server import bind
from experiment.results.report import write_report
from experiment.results.report.followed_pages import FollowedPages
from experiment.results.report.page_server import PageServer
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import lock_run

_VIEWS = ((1180, 860, "light"), (390, 860, "dark"))
_RUNS = {"base": (20_000, 4e-4), "base-lr-5e-4": (20_000, 5e-4), "base-lr-8e-4": (9_000, 8e-4), "large": (6_000, 3e-4)}
_RUNNING = ("large",)
_HOVER = """
    const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
    const at = {clientX: box.left + box.width * 0.35, clientY: box.top + 90, bubbles: true};
    svg.dispatchEvent(new PointerEvent("pointermove", at));"""


def take() -> None:
    """Save both views of each page side by side."""
    with tempfile.TemporaryDirectory() as folder, chromium() as driver:
        page = write_report(make_run(Path(folder) / "encoder-base", steps=20_000).path)
        _save(driver, page.as_uri(), "report-page.png")
    with tempfile.TemporaryDirectory() as folder, chromium() as driver, ExitStack() as stack:
        for seed, (name, (steps, lr)) in enumerate(_RUNS.items()):
            run = make_run(Path(folder) / "runs" / name, steps, lr, seed)
            if name in _RUNNING:
                stack.enter_context(lock_run(run))
        _save(driver, stack.enter_context(_followed(Path(folder) / "runs")), "runs-page.png")


@contextmanager
def _followed(folder: Path) -> Iterator[str]:
    with bind("127.0.0.1", 0) as listener, PageServer(listener, FollowedPages([RunFolder(folder)])) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def _save(driver: webdriver.Chrome, url: str, name: str) -> None:
    views = [_view(driver, url, *view) for view in _VIEWS]
    save_side_by_side(views, Path(__file__).with_name(name), colors=256)


def _view(driver: webdriver.Chrome, url: str, width: int, height: int, scheme: str) -> Image.Image:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(url)
    WebDriverWait(driver, 60).until(lambda driver: driver.find_elements("css selector", "path.line"))
    if url.startswith("http:"):
        WebDriverWait(driver, 60).until(lambda driver: driver.find_elements("css selector", ".live"))
    driver.execute_script(_HOVER)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    take()
