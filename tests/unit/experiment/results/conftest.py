from collections.abc import Iterator
from typing import Any

import pytest

from experiment.results.report import followed_pages
from waiting import LIMIT


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    from headless_chromium import start_browser  # skips the test without selenium

    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed pages wait until everything is read, however busy the machine is."""
    monkeypatch.setattr(followed_pages, "_WAIT", LIMIT)
    monkeypatch.setattr(followed_pages, "_PAGE_WAIT", LIMIT)
