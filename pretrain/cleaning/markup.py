"""Text out of HTML and wiki markup. Runs in the workers, because it takes longer than all filters."""

import logging

import regex

_MEDIA = regex.compile(r"(?i)^(?:file|image|category|datei|fichier|kategorie|catégorie|文件|分类)\s*:")
_REMOVED_TAGS = frozenset({"ref", "gallery", "math", "timeline", "score", "syntaxhighlight", "table"})
_BLANK_LINES = regex.compile(r"\n{3,}")


def to_text(text: str, markup: str) -> str:
    """Return the text without markup; empty if there is none."""
    return _from_html(text) if markup == "html" else _from_wikitext(text) if markup == "wikitext" else text


def join_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace half ones, which files refuse."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _from_html(text: str) -> str:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # pages without text are no problem
    found: str | None = trafilatura.extract(text, include_comments=False, include_tables=False)
    return found or ""


def _from_wikitext(source: str) -> str:
    import mwparserfromhell

    code = mwparserfromhell.parse(source)
    # Emptied, not removed: `remove` searches the whole page for each of them.
    for media in code.filter_wikilinks(matches=lambda link: _MEDIA.match(str(link.title))):
        media.title, media.text = "", None
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in _REMOVED_TAGS):
        tag.contents = ""
    plain: str = code.strip_code()
    text = str(_BLANK_LINES.sub("\n\n", plain)).strip()
    return join_surrogates(text)  # of entities such as `&#xD800;`
