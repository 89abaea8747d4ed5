"""Text out of HTML and wiki markup. Runs in the workers, because it takes longer than all filters."""

import logging

import regex

HTTP_ERROR = "http_error"
"""In place of the markup of a text: a page that its server did not return."""

TOO_LARGE = "too_large"
"""In place of the markup of a text: a page of more than `MAX_PAGE_BYTES`."""

MAX_PAGE_BYTES = 64 << 20
"""Of a page, decompressed: a small one may become larger than the memory."""

# Namespaces in every wiki, and in the Chinese Wikipedia, whose dumps name only the English ones.
_FILES_AND_CATEGORIES = {"file", "image", "category", "文件", "檔案", "档案", "图像", "圖像", "分類", "分类"}
_REMOVED_TAGS = frozenset({"ref", "gallery", "math", "timeline", "score", "syntaxhighlight", "table"})
_TEMPLATE = "\0"  # in place of each
_LEFT_EMPTY = regex.compile(rf" ?[(（]\s*{_TEMPLATE}[\s{_TEMPLATE}]*[)）]|{_TEMPLATE}")
# https://www.mediawiki.org/wiki/Writing_systems/Syntax
_CONVERTED_LANGUAGES = {"ban", "crh", "gan", "iu", "kk", "ku", "mni", "sh", "shi", "sr", "tg", "tly", "uz", "wuu", "zh"}
_CONVERSION = regex.compile(r"-\{((?:(?!-\{|\}-).)*+)\}-", regex.DOTALL)
_CONVERSION_DEPTH = 10
_VARIANT = regex.compile(r"(?:^|;)\s*(?:zh|[a-z]{2,3}-[a-z]{2,4})\s*:")
_BLANK_LINES = regex.compile(r"\n{3,}")


def to_text(text: str, markup: str) -> str:
    """Return the text without markup; empty if there is none.

    markup: "html", or "wikitext", perhaps with the language of the wiki and names of namespaces whose links are no
    text, separated by colons.
    """
    kind, *wiki = markup.split(":")
    return _from_html(text) if kind == "html" else _from_wikitext(text, *wiki) if kind == "wikitext" else text


def join_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace half ones, which files refuse."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _from_html(text: str) -> str:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # pages without text are no problem
    found: str | None = trafilatura.extract(text, include_comments=False, include_tables=False)
    return found or ""


def _from_wikitext(source: str, language: str = "", *namespaces: str) -> str:
    import mwparserfromhell

    hidden = _FILES_AND_CATEGORIES.union(map(str.lower, namespaces))
    code = mwparserfromhell.parse(source)
    # Emptied, not removed: `remove` searches the whole page for each of them.
    for media in code.filter_wikilinks(matches=lambda link: _namespace(str(link.title)) in hidden):
        media.title, media.text = "", None
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in _REMOVED_TAGS):
        tag.contents = ""
    template = mwparserfromhell.nodes.Text(_TEMPLATE)
    code.nodes = [template if isinstance(node, mwparserfromhell.nodes.Template) else node for node in code.nodes]
    text = _LEFT_EMPTY.sub("", code.strip_code())
    if language in _CONVERTED_LANGUAGES:
        text = _in_one_variant(text)
    text = _BLANK_LINES.sub("\n\n", text).strip()
    return join_surrogates(text)  # of entities such as `&#xD800;`


def _namespace(title: str) -> str:
    """Return the namespace of a page in lower case; empty if its title has none."""
    name, colon, _ = title.replace("_", " ").partition(":")
    return name.strip().lower() if colon else ""


def _in_one_variant(text: str) -> str:
    """Replace texts in several variants of a language, such as `-{zh-hans:计算机;zh-hant:電腦}-`, by the first one."""
    for _ in range(_CONVERSION_DEPTH):
        text, replaced = _CONVERSION.subn(_first_variant, text)
        if not replaced:
            break
    return text


def _first_variant(conversion: regex.Match[str]) -> str:
    flags, _, variants = conversion[1].rpartition("|")
    if {"H", "T", "-"} & {flag.strip() for flag in flags.split(";")}:  # rules for the page, or its title
        return ""
    first: str = _VARIANT.split(variants)[:2][-1]
    return first.strip(" ;\n")
