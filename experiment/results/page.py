"""A page of results: a list of blocks becomes one HTML file that needs only the images next to it.

The markup and the style are in `page.html.j2`, which names the fields of the blocks below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiment.files import write_text

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are text, shown as given. The first `labels` columns name the row, the others hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    labels: int = 1


@dataclass(frozen=True)
class Figure:
    """An image file in the folder of the page."""

    file: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text, collapsed under its title."""

    title: str
    text: str


Block = Heading | Text | Table | Figure | Code


def write_page(directory: Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write `directory`/index.html and return its path. The images must already be in `directory`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    kinds = [(type(block).__name__, block) for block in blocks]
    path = directory / "index.html"
    write_text(path, environment.get_template(TEMPLATE).render(title=title, blocks=kinds))
    return path
