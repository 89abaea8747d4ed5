"""Makes docs/images/serve-page.png: the page of a running `deepcloze serve`, on a desktop and on a phone.

    deepcloze serve --model runs/sst2 &
    python docs/images/serve_page.py --text "a gorgeous , witty film"

Needs the extra `test` and Debian's chromium-driver.
"""

import io
from pathlib import Path

import fire
from PIL import Image
from screenshots import chromium, save_side_by_side
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

_SIZES = ((760, 380), (360, 380))


def take(text: str, url: str = "http://127.0.0.1:8000/") -> None:
    """Type a text, predict, and save both views side by side."""
    with chromium() as driver:
        views = [_view(driver, url, text, *size) for size in _SIZES]
    save_side_by_side(views, Path(__file__).with_name("serve-page.png"), colors=64)


def _view(driver: webdriver.Chrome, url: str, text: str, width: int, height: int) -> Image.Image:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(url)
    wait = WebDriverWait(driver, 60)
    wait.until(lambda driver: driver.find_elements("tag name", "textarea"))[0].send_keys(text)
    driver.find_element("tag name", "button").click()
    wait.until(lambda driver: driver.find_elements("css selector", "#answer .row"))
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    fire.Fire(take)
