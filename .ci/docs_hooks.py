"""Hooks of MkDocs: links from docs/ to files that are not pages of the site become plain text."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)\s]*\)", r"\1", markdown)
