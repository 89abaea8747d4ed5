"""Removal of HTML tags inside texts. Whole pages are read as text by the readers of `.html` and web archives."""

import html
import re
from html.entities import html5

from experiment.config import Section
from pretrain.cleaning.step import Document, DocumentStep, Verdict

_BREAKS = (
    "address|article|aside|blockquote|br|caption|center|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "frameset|h[1-6]|header|hgroup|hr|legend|li|main|nav|noscript|ol|optgroup|option|p|pre|section|select|summary|table|"
    "tbody|td|textarea|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|applet|audio|b|bdi|bdo|big|blink|body|button|canvas|cite|code|col|colgroup|datalist|del|dfn|em|embed|"
    "font|frame|head|html|i|iframe|img|input|ins|kbd|label|link|mark|marquee|meta|meter|nobr|picture|progress|q|rp|rt|ruby|"
    r"s|samp|small|span|strike|strong|sub|sup|svg|time|tt|u|var|video|wbr|(?:o|st1|v|w):\w+"  # with colons: of Word
)
# These are names in code too, as in `vector<map>`.
_NAMES = "area|base|data|dialog|dir|map|menu|object|output|param|slot|source|template|track"
_SWITCHES = (
    "allowfullscreen|async|autofocus|autoplay|checked|compact|controls|default|defer|disabled|hidden|ismap|itemscope|loop|"
    r"multiple|muted|noshade|novalidate|nowrap|open|readonly|required|reversed|selected|data-[\w.-]+"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'=<>`][^\s"'<>`]*)"""
_ATTRIBUTES = rf"(?:\s+(?:[a-z_:][\w:.-]*\s*=\s*{_VALUE}|{_SWITCHES}))*\s*"  # in code, `i<a && j>b` has none
_HIDDEN = ("script", "style", "svg")
_OPENING = re.compile(r"<!--|<(script|style|svg(?![^<>]*/>))(?:\s[^<>]*)?>", re.IGNORECASE)  # <svg/> has no content
_CLOSING = {"": re.compile("-->")} | {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in _HIDDEN}
_READING = re.compile(r"<(rp|rt)(?:\s[^<>]*)?>[^<]*</\1\s*>", re.IGNORECASE)  # beside a character, such as furigana
_BREAK = re.compile(rf"</?(?:{_BREAKS}){_ATTRIBUTES}/?>", re.IGNORECASE)
_NAMED = rf"<(?:{_NAMES})(?=\s+[a-z:-]+\s*=){_ATTRIBUTES}/?>|</(?:{_NAMES})\s*>"
_TAG = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}/?>|{_NAMED}", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|([a-z][a-z0-9]*));", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n{3,}")


class Config(Section):
    """Remove HTML tags and comments, such as `<b>`, and decode entities such as `&amp;`; `<br />` and the tags of
    paragraphs, lists and tables become line breaks. For prose: code may have texts that look like tags. The
    text in `<script>`, `<style>`, `<svg>` and `<rt>`, the reading of a character, is removed too."""


class Step(DocumentStep[Config]):
    config_type = Config
    repairs = True

    def apply(self, document: Document) -> Verdict | None:
        text = "\n".join(_lines(_READING.sub("", _without_hidden(document.text))))
        text = _ENTITY.sub(_decoded, _TAG.sub("", text)).replace("\r\n", "\n")  # perhaps of `&#13;`
        if text == document.text:
            return None
        document.text = _BLANK_LINES.sub("\n\n", text).strip()
        return Verdict("removed", dropped=False)


def _decoded(entity: re.Match[str]) -> str:
    """Return the character of an entity. One that HTML does not know stays, such as `&regs;` in code."""
    is_known = entity[1] is None or f"{entity[1]};" in html5
    return html.unescape(entity[0]) if is_known else entity[0]


def _without_hidden(text: str) -> str:
    """Return the text without comments, scripts and styles; one that is not closed stays."""
    kept, end, unclosed = list[str](), 0, set[str]()
    for opening in _OPENING.finditer(text):
        name = (opening[1] or "").lower()
        if opening.start() < end or name in unclosed:
            continue
        closing = _CLOSING[name].search(text, opening.end())
        if closing is None:
            unclosed.add(name)
            continue
        kept.append(text[end : opening.start()])
        end = closing.end()
    return "".join([*kept, text[end:]])


def _lines(text: str) -> list[str]:
    """Split at tags that begin or end a line, and remove spaces there."""
    first, *others = _BREAK.split(text)
    if not others:
        return [first]
    *between, last = (piece.lstrip(" \t") for piece in others)
    return [first.rstrip(" \t"), *(piece.rstrip(" \t") for piece in between), last]
