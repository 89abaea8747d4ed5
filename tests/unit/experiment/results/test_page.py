import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

from experiment.results.charts import Charts, DotChart, DotCharts, Dots, Line, Panel, Plot
from experiment.results.curves import Curve
from experiment.results.page import (
    Bar,
    BarChart,
    BarCharts,
    Block,
    Code,
    ConfusionMatrix,
    Fact,
    Filling,
    Fillings,
    Heading,
    Headline,
    Page,
    SeenText,
    SeenTexts,
    SeenToken,
    Table,
    Text,
    write_page,
)

BLOCKS: list[Block] = [
    Heading("Results <&>"),
    Text("Loss < 3 & falling."),
    Table(["corpus", "loss"], [["a<b>", "1.0"], ["news", "2.0"]], caption="Held out"),
    ConfusionMatrix(["<joy>", "fear"], [[3000, 1], [0, 0]], "<test>"),
    Charts([Plot("loss", [Panel("loss", [Line("</script><b>", Curve.of([1], [2.0]))], title="Loss <1>")])]),
    DotCharts("scores", [DotChart("F1 <%>", [Dots("<row>", [0.25, 0.75], 0.5, (0.0, 1.0))])]),
    Fillings([Filling("a <i>", "<b>", " c", [("step 1", [("<u>", "9.0%")])])]),
    BarCharts([BarChart("Tokens <%>", [Bar("<of>", 0.2), Bar("the", 0.1)])]),
    SeenTexts([SeenText("document <1>", [SeenToken("<s>"), SeenToken("<mask>", "<p>")])]),
    Code("config.yaml", "run:\n  dir: <x>\n"),
]
HEADLINE = Headline("running <&>", "busy", "since <now>", [Fact("Tokens", "1<2", "<3")])


class Outline(HTMLParser):
    """Checks that tags nest, and collects the text in each kind of tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


def test_blocks_become_html_in_their_order(tmp_path: Path) -> None:
    """Catches text that is not escaped, tags that do not nest, and missing blocks."""
    path = write_page(tmp_path / "new" / "index.html", Page("Run {1}", BLOCKS, HEADLINE))
    assert path == tmp_path / "new" / "index.html"
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    assert [text for text in outline.texts if text[0] not in ("style", "script")] == [
        ("title", "Run {1}"),
        ("h1", "Run {1}"),
        ("span", "running <&>"),
        ("p", "since <now>"),
        ("dt", "Tokens"),
        ("dd", "1<2"),
        ("small", "<3"),
        ("h2", "Results <&>"),
        ("p", "Loss < 3 & falling."),
        ("caption", "Held out"),
        ("th", "corpus"),
        ("th", "loss"),
        *[("td", cell) for cell in ("a<b>", "1.0", "news", "2.0")],
        ("caption", "<test>: rows are labels, columns predicted labels; color is the share of the row"),
        *[("span", label) for label in ("<joy>", "fear")],
        *[("th", "<joy>"), ("td", "3,000"), ("td", "1")],
        *[("th", "fear"), ("td", "0"), ("td", "0")],
        ("figcaption", "Loss <1>"),
        ("p", "The charts need JavaScript. `deepcloze report` also writes them as PNG files next to this page."),
        ("figcaption", "F1 <%>"),
        ("div", "<row>"),
        ("div", "0.5000"),
        ("small", "0.0000 to 1.0000"),
        *[("span", tick) for tick in ("0", "0.25", "0.5", "0.75", "1")],
        ("p", "a <i>"),
        ("mark", "<b>"),
        ("p", " c"),
        ("td", "step 1"),
        ("bdi", "<u>"),
        ("span", "9.0%"),
        ("figcaption", "Tokens <%>"),
        *[("div", "<of>"), ("div", "20.0%"), ("div", "the"), ("div", "10.0%")],
        ("figcaption", "document <1>"),
        *[("span", "<s>"), ("b", "<mask>"), ("small", "<p>")],
        ("summary", "config.yaml"),
        ("pre", "run:\n  dir: <x>\n"),
    ]


def test_text_from_right_to_left(tmp_path: Path) -> None:
    """Catches words and punctuation of Arabic or Hebrew that a page shows in the wrong order."""
    words = ["[CLS]", "ذهب", "الولد", ".", "[SEP]"]
    blocks: list[Block] = [
        *(SeenTexts([SeenText("text", [SeenToken(word) for word in seen])]) for seen in (words, ["[CLS]", "he"])),
        Fillings([Filling("ذهب ", "الولد", ".", [("step 1", [("البيت", "9.0%")])])]),
        Table(["text", "loss"], [["ذهب (A1).", "1.0"]]),
    ]
    text = write_page(tmp_path / "page.html", Page("Run", blocks)).read_text(encoding="utf-8")
    starts = (
        'dir="rtl"><span>[CLS]',
        'dir="ltr"><span>[CLS]',
        'dir="auto">ذهب <mark>',
        "<bdi>البيت",
        'dir="auto">ذهب (A1)',
    )
    assert [start for start in starts if start not in text] == []


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Catches scripts, fonts or styles from the network: clusters often have no access."""
    text = write_page(tmp_path / "page.html", Page("Run", BLOCKS)).read_text(encoding="utf-8")
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, which is not opened
    assert not re.search(r"https?:|src=\"/|<link|@import|url\(['\"]", text)


def test_a_page_runs_its_own_script_only(tmp_path: Path) -> None:
    """Catches a policy that another script passes, or that keeps the page's own one from running; and data that end
    their element."""
    text = write_page(tmp_path / "page.html", Page("Run", BLOCKS)).read_text(encoding="utf-8")
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert r"\u003c/script\u003e" in data
    allowed = re.search(r"default-src 'none'; script-src 'sha256-([^']+)'", text)
    assert allowed
    assert base64.b64decode(allowed[1]) == hashlib.sha256(script.encode()).digest()


def test_a_matrix_of_many_labels_has_colors_only(tmp_path: Path) -> None:
    """Catches a matrix whose numbers are too small to read, and a page of megabytes."""
    counts = [[int(row == column) for column in range(200)] for row in range(200)]
    matrix = ConfusionMatrix([f"label-{number}" for number in range(200)], counts, "test")
    text = write_page(tmp_path / "page.html", Page("Run", [matrix])).read_text(encoding="utf-8")
    assert text.count("<td") == 200 * 200
    assert text.count('style="--share:1"') == 200
    assert "label-7" not in text
    assert len(text) < 500_000
