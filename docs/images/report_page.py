"""Makes docs/images/report-page.png: the top of a report, on a desktop and on a phone in dark mode.

    PYTHONPATH=tests/unit/experiment/results python docs/images/report_page.py

Needs the extra `test` and Debian's chromium-driver. The run is made up.
"""

import io
import tempfile
from pathlib import Path

from PIL import Image
from sample_run import make_run
from screenshots import chromium, save_side_by_side
from selenium import webdriver

from experiment.results.report import write_report

_VIEWS = ((1180, 860, "light"), (390, 860, "dark"))
_HOVER = """
    const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
    const at = {clientX: box.left + box.width * 0.35, clientY: box.top + 90, bubbles: true};
    svg.dispatchEvent(new PointerEvent("pointermove", at));"""


def take() -> None:
    """Save both views side by side."""
    with tempfile.TemporaryDirectory() as folder, chromium() as driver:
        page = write_report(make_run(Path(folder) / "encoder-base", steps=20_000).path)
        views = [_view(driver, page, *view) for view in _VIEWS]
    save_side_by_side(views, Path(__file__).with_name("report-page.png"), colors=256)


def _view(driver: webdriver.Chrome, page: Path, width: int, height: int, scheme: str) -> Image.Image:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.as_uri())
    driver.execute_script(_HOVER)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    take()
