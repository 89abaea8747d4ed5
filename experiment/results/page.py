"""A page of results: a list of blocks becomes one HTML file that needs nothing else.

The markup is in `page.html.j2`, which names the fields of the blocks below, the style in `page.css`, and the script
that draws the charts in `page.js`.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiment.files import write_text
from experiment.results.charts import Charts, DotCharts

Tone = Literal["good", "busy", "warn", "bad", "plain"]

PAGE = "index.html"  # in the folder of a report
TEMPLATE, STYLE, SCRIPT = "page.html.j2", "page.css", "page.js"


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
class ConfusionMatrix:
    """Counts: rows by label, columns by predicted label."""

    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text, collapsed under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Filling:
    """A sentence with a masked token, and what a model fills in at several steps."""

    before: str
    answer: str
    after: str
    guesses: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (step, (token, probability), the most probable first)


@dataclass(frozen=True)
class Fillings:
    fillings: Sequence[Filling]


@dataclass(frozen=True)
class Bar:
    label: str
    share: float  # 0 to 1


@dataclass(frozen=True)
class BarChart:
    """Shares as bars, the longest as wide as the chart."""

    title: str
    bars: Sequence[Bar]

    @property
    def longest(self) -> float:
        return max(bar.share for bar in self.bars)


@dataclass(frozen=True)
class BarCharts:
    charts: Sequence[BarChart]


@dataclass(frozen=True)
class SeenToken:
    """A token as a model sees it."""

    text: str
    answer: str | None = None  # the token that is predicted here; None: none is


@dataclass(frozen=True)
class SeenText:
    title: str
    tokens: Sequence[SeenToken]


@dataclass(frozen=True)
class SeenTexts:
    texts: Sequence[SeenText]


Block = Heading | Text | Table | ConfusionMatrix | Code | Charts | DotCharts | BarCharts | Fillings | SeenTexts


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """What the page says first."""

    state: str
    tone: Tone  # of the state
    message: str
    facts: Sequence[Fact]


def write_page(path: Path, title: str, blocks: Sequence[Block], headline: Headline | None = None) -> Path:
    """Write the page to `path` and return it."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = (folder / STYLE).read_text(encoding="utf-8")
    script = (folder / SCRIPT).read_text(encoding="utf-8")
    # The only script that browsers run, should text of the user ever end up as markup.
    digest = hashlib.sha256(f"\n{script}".encode()).digest()
    text = environment.get_template(TEMPLATE).render(
        title=title,
        headline=headline,
        blocks=[(type(block).__name__, block) for block in blocks],
        style=style,
        script=script,
        zip=zip,
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
    )
    write_text(path, text)
    return path
