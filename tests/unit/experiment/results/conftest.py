from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    from headless_chromium import start_browser  # skips the test without selenium

    driver = start_browser()
    yield driver
    driver.quit()
