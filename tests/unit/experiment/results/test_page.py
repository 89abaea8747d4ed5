import re
from html.parser import HTMLParser
from pathlib import Path

from experiment.results.page import Code, Figure, Heading, Table, Text, write_page

BLOCKS = [
    Heading("Results <&>"),
    Text("Loss < 3 & falling."),
    Table(["corpus", "loss"], [["a<b>", "1.0"], ["news", "2.0"]], caption="Held out"),
    Figure("loss.png", 'The "loss"'),
    Code("config.yaml", "run:\n  dir: <x>\n"),
]


class Outline(HTMLParser):
    """Checks that tags nest, and collects the text in each kind of tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.images: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


def test_blocks_become_html_in_their_order(tmp_path: Path) -> None:
    """Catches text that is not escaped, tags that do not nest, and missing blocks."""
    path = write_page(tmp_path / "new", "Run {1}", BLOCKS)
    assert path == tmp_path / "new" / "index.html"
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    assert outline.images == ["loss.png"]
    assert [text for text in outline.texts if text[0] != "style"] == [
        ("title", "Run {1}"),
        ("h1", "Run {1}"),
        ("h2", "Results <&>"),
        ("p", "Loss < 3 & falling."),
        ("caption", "Held out"),
        ("th", "corpus"),
        ("th", "loss"),
        *[("td", cell) for cell in ("a<b>", "1.0", "news", "2.0")],
        ("figcaption", 'The "loss"'),
        ("summary", "config.yaml"),
        ("pre", "run:\n  dir: <x>\n"),
    ]


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Catches scripts, fonts or styles from the network: clusters often have no access."""
    text = write_page(tmp_path, "Run", BLOCKS).read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
