"""Hooks of MkDocs. The first page has sections of the README, and the site has pages from outside of docs/.

Links to other files of the repository become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[1]
_OTHER_PAGES = (
    "hostfiles/README.md",
    "ds_configs/README.md",
    "benchmarks/RESULTS.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
# Of search results: pages that explain a word come before those that use it, and those for contributors last.
_BOOSTS = dict.fromkeys(("checkpoints.md", "corpus.md", "hostfiles/README.md"), 4) | dict.fromkeys(
    ("architecture.md", "decisions.md", "benchmarks/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"), 0.1
)
_README_SECTION = re.compile(r"^## (.+)\n\n.*\(\.\./README\.md#.*\n", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for path in _OTHER_PAGES:
        files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    address = page.file.src_uri
    page.meta["search"] = {"boost": _BOOSTS.get(address, 1)}
    if address == "README.md":
        markdown = _README_SECTION.sub(lambda found: _readme_section(found[1]), markdown)
    return _site_links(markdown, address if address in _OTHER_PAGES else f"docs/{address}", address)


def _readme_section(heading: str) -> str:
    """Return a section of the README, whose links start at docs/."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section '{heading}'"
    return _site_links(found[0], "README.md", "README.md")


def _site_links(markdown: str, path: str, address: str) -> str:
    """Replace links between files of the repository by links between pages of the site.

    path: of the file with the links. address: of the page that they are for.
    """

    def replace(found: re.Match[str]) -> str:
        label, target, anchor = found.groups(default="")
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (_ROOT / linked).exists():  # on the web, or code that looks like a link
            return found[0]
        if linked not in _OTHER_PAGES and not linked.startswith("docs/") and linked != "README.md":
            return label
        page = linked.removeprefix("docs/")
        return f"[{label}]({posixpath.relpath(page, posixpath.dirname(address) or '.')}{anchor})"

    return _LINK.sub(replace, markdown)
