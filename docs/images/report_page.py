"""Makes docs/images/report-page.png: the top of a report, on a desktop and on a phone in dark mode.

    PYTHONPATH=tests/unit/experiment/results python docs/images/report_page.py

Needs the extra `test` and Debian's chromium-driver. The run is made up.
"""

import io
import tempfile
from pathlib import Path

from PIL import Image
from sample_run import make_run
from selenium import webdriver

from experiment.results.report import write_report

_VIEWS = ((1180, 860, "light"), (390, 860, "dark"))
_MARGIN, _GREY = 16, (208, 208, 208)
_HOVER = """
    const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
    const at = {clientX: box.left + box.width * 0.35, clientY: box.top + 90, bubbles: true};
    svg.dispatchEvent(new PointerEvent("pointermove", at));"""


def take() -> None:
    """Save both views side by side."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with tempfile.TemporaryDirectory() as folder, webdriver.Chrome(options, service) as driver:
        page = write_report(make_run(Path(folder) / "encoder-base", steps=20_000).path)
        views = [_view(driver, page, *view) for view in _VIEWS]
    sheet = Image.new("RGB", (sum(view.width for view in views) + 3 * _MARGIN, views[0].height + 2 * _MARGIN), _GREY)
    left = _MARGIN
    for view in views:
        sheet.paste(view, (left, _MARGIN))
        left += view.width + _MARGIN
    sheet.quantize(256).save(Path(__file__).with_name("report-page.png"), optimize=True)


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
