"""Screenshots for the documentation: headless Chromium, and several pictures side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver

_MARGIN, _GREY = 16, (208, 208, 208)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver")) as driver:
        yield driver


def save_side_by_side(views: Sequence[Image.Image], path: Path, colors: int) -> None:
    """Save pictures as one PNG with a palette of `colors` colors."""
    width = sum(view.width + _MARGIN for view in views) + _MARGIN
    sheet = Image.new("RGB", (width, max(view.height for view in views) + 2 * _MARGIN), _GREY)
    left = _MARGIN
    for view in views:
        sheet.paste(view, (left, _MARGIN))
        left += view.width + _MARGIN
    sheet.quantize(colors).save(path, optimize=True)
