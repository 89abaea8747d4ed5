"""The documentation site, in headless Chromium."""

import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headless_chromium import start_browser
from waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.soak

FOUND = """
const link = document.querySelector(".md-search-result__link");
return link && new URL(link.href).pathname.slice(1)"""
# Tables, which the theme puts into boxes that scroll sideways.
TOO_WIDE = """
const tables = [...document.querySelectorAll(".md-content table")];
const boxes = tables.map(table => table.closest(".md-typeset__scrollwrap"));
return boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText.slice(0, 100))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a warning, such as one of a link without a target, is an error."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_browser()
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("resume", "checkpoints.html"),
        ("resume on fewer GPUs", "checkpoints.html"),
        ("checkpoint", "checkpoints.html"),
        ("hostfile", "hostfiles/index.html"),
        ("slurm", "hostfiles/index.html"),
        ("out of memory", "precision.html"),
        ("install", "index.html"),
        ("docker", "container.html"),
        ("tokenizer", "corpus.html"),
        ("learning rate", "schedules.html"),
        ("early stopping", "evaluation.html"),
        ("fine-tune", "finetuning.html"),
        ("onnx", "exporting.html"),
        ("wandb", "tracking.html"),
        ("mlm_probability", "from_run_mlm.html"),
    ],
)
def test_search_finds_the_right_page_first(query: str, page: str, url: str, browser: Any) -> None:
    """Catches a heading that hides the page that explains a word behind those that use it."""
    browser.get(f"{url}/index.html?q={query.replace(' ', '+')}")
    wait_until(lambda: browser.execute_script(FOUND))
    assert browser.execute_script(FOUND) == page


def test_no_table_scrolls_sideways(site: Path, url: str, browser: Any) -> None:
    """Catches a table whose last columns a reader does not see."""
    too_wide = {}
    for page in sorted(site.rglob("*.html")):
        browser.get(f"{url}/{page.relative_to(site)}")
        wait_until(lambda: browser.execute_script("return !document.querySelector('.md-content :not(div) > table')"))
        too_wide[page.name] = browser.execute_script(TOO_WIDE)
    assert len(too_wide) > 40
    assert {name: tables for name, tables in too_wide.items() if tables} == {}


def test_the_first_page_has_the_sections_of_the_readme(site: Path) -> None:
    """Catches links to the README in place of its sections, and their links and pictures that lead nowhere."""
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "README" not in page.partition('<article class="md-content__inner')[2].partition("</article>")[0]
    for expected in ("deepcloze pretrain", 'src="images/demo-loss.png"', 'href="hostfiles/index.html"', 'id="state"'):
        assert expected in page
    assert (site / "images/demo-loss.png").is_file()
