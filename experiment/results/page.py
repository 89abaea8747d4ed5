"""A page of results: a list of blocks becomes one HTML file that needs nothing but the images beside it."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.files import write_text


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are shown as they are given; the first `labels` columns name the row, the others are figures."""

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
    """Text whose lines and spaces matter, folded under its title."""

    title: str
    text: str


Block = Heading | Text | Table | Figure | Code


def write_page(directory: Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write `directory`/index.html and return its path. The figures must stand in `directory` already."""
    body = "\n".join(_render(block) for block in blocks)
    path = directory / "index.html"
    write_text(path, _PAGE.format(title=html.escape(title), style=_STYLE, body=body))
    return path


def _render(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Figure(file, caption):
            return (
                f'<figure><img src="{html.escape(file)}" alt="{html.escape(caption)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case Code(title, text):
            return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        case Table(columns, rows, caption, labels):
            title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
            head = _cells("th", columns, labels)
            lines = "\n".join(f"<tr>{_cells('td', row, labels)}</tr>" for row in rows)
            table = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"
            return f'<div class="wide">{table}</div>'


def _cells(tag: str, row: Sequence[str], labels: int) -> str:
    marks = [' class="label"' if column < labels else "" for column in range(len(row))]
    return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2430; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #d9dee6; }
p { max-width: 46rem; }
figure, .wide, details { background: #fff; border: 1px solid #e1e5eb; border-radius: 8px; margin: 1rem 0; }
figure { padding: 1rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption, caption { color: #596579; font-size: .875rem; }
figcaption { margin-top: .5rem; }
caption { caption-side: top; text-align: left; padding: .75rem 1rem .25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1rem; text-align: right; border-top: 1px solid #eef1f5; }
th { color: #596579; font-weight: 600; font-size: .8125rem; border-top: 0; vertical-align: bottom; }
.label { text-align: left; }
td { overflow-wrap: break-word; }
summary { cursor: pointer; padding: .75rem 1rem; font-weight: 600; }
pre { margin: 0; padding: 0 1rem 1rem; overflow-x: auto; font: .8125rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
"""
