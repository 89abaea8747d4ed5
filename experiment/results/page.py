"""A page of results: a list of blocks becomes one HTML file that needs nothing else.

The markup is in `page.html.j2` and `blocks.html.j2`, which names the fields of the blocks below, the style in
`page.css`, and the script that draws the charts in `page.js`.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal
from unicodedata import bidirectional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic_core import to_json

from experiment.files import write_text
from experiment.results.charts import Charts, ChartsData, DotCharts

Tone = Literal["good", "busy", "warn", "bad", "plain"]

PAGE = "index.html"  # in the folder of a report
TEMPLATE, BLOCKS, STYLE, SCRIPT = "page.html.j2", "blocks.html.j2", "page.css", "page.js"


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
    """A sentence with a masked word, and a model's fillings at several steps."""

    before: str
    answer: str
    after: str
    guesses: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (step, (word, probability), the most probable first)


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
    is_apart: bool = False  # from the token before it, with which it has no word in common


@dataclass(frozen=True)
class SeenText:
    title: str
    tokens: Sequence[SeenToken]

    @property
    def direction(self) -> str:
        """That of most letters: the first ones may be those of a special token, such as [CLS]."""
        letters = Counter(bidirectional(character) for token in self.tokens for character in token.text)
        return "rtl" if letters["R"] + letters["AL"] > letters["L"] else "ltr"


@dataclass(frozen=True)
class SeenTexts:
    texts: Sequence[SeenText]


@dataclass(frozen=True)
class Links:
    """(text, target)."""

    title: str
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """A number of a run. value: to sort by; None: not known."""

    text: str
    value: float | None


@dataclass(frozen=True)
class RunRow:
    """A run in the charts below the table. link: its own page."""

    name: str
    link: str | None
    state: str
    tone: Tone
    color: str  # of its curves, as their dash
    dash: str
    shown: bool  # whether its curves are drawn at first
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Runs:
    """A table of runs that can be sorted and filtered, and chooses those that the charts below show."""

    columns: Sequence[str]
    rows: Sequence[RunRow]


Block = (
    Heading
    | Text
    | Links
    | Table
    | Runs
    | ConfusionMatrix
    | Code
    | Charts
    | DotCharts
    | BarCharts
    | Fillings
    | SeenTexts
)


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Headline:
    state: str
    tone: Tone  # of the state
    message: str
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Page:
    title: str
    blocks: Sequence[Block]
    headline: Headline | None = None
    home: str | None = None  # link to the page that this one was opened from


@dataclass(frozen=True)
class Part:
    """A block of a page as HTML."""

    key: str  # the same as long as its element can be kept
    html: str
    charts: Charts | None = None  # whose data the script draws


def write_page(path: Path, page: Page) -> Path:
    """Write the page to `path` and return it."""
    parts = [(part, None if part.charts is None else ChartsData(part.charts).changes()) for part in render_parts(page)]
    write_text(path, render_page(page.title, parts))
    return path


def render_parts(page: Page) -> Iterator[Part]:
    """Yield the header, and the blocks."""
    render = open_templates().get_template(BLOCKS).module.render  # type: ignore[attr-defined]
    yield Part("header", str(render("Header", page)))
    seen = Counter[str]()
    for block in page.blocks:
        kind = type(block).__name__
        html = str(render(kind, block))
        name = kind if isinstance(block, Runs) else hashlib.sha256(html.encode()).hexdigest()[:12]
        seen[name] += 1
        yield Part(f"{name}-{seen[name]}", html, block if isinstance(block, Charts) else None)


def render_page(title: str, parts: Sequence[tuple[Part, object]], version: int | None = None) -> str:
    """Return the HTML of a page. parts: with the data of their charts. version: of these, if a server keeps them
    current."""
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    # The only script that browsers run, should text of the user ever end up as markup.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    template = open_templates().get_template(TEMPLATE)
    return template.render(
        title=title,
        policy=policy if version is None else f"{policy}; connect-src 'self'",
        version=version,
        style=style,
        script=script,
        parts=[(part, None if data is None else _without_markup(data)) for part, data in parts],
    )


def _without_markup(data: object) -> str:
    """Format as JSON in which nothing ends its HTML element."""
    return to_json(data).decode().replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


@cache
def open_templates(*folders: Path, autoescape: bool = True) -> Environment:
    """Open the templates in these folders and in this module's folder."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["zip"] = zip
    return environment
