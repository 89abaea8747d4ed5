"""Removal of HTML tags inside texts. Whole pages are read as text by the readers of `.html` and web archives."""

import html
import re

from experiment.config import Section
from pretrain.cleaning.step import Document, DocumentStep, Verdict

_BREAKS = (
    "address|article|aside|blockquote|br|caption|center|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|header|hr|li|"
    "main|nav|ol|option|p|pre|section|select|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|b|big|body|cite|code|del|dfn|em|font|head|html|i|iframe|img|input|ins|kbd|label|link|mark|meta|q|s|"
    "samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr"
)
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(rf"[ \t]*</?(?:{_BREAKS})(?:\s[^<>]*)?/?>[ \t]*", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z][a-z0-9]*);", re.IGNORECASE)  # `&` alone may be part of a URL
_BLANK_LINES = re.compile(r"\n{3,}")


class Config(Section):
    """Remove HTML tags and comments, such as `<br />` in reviews, and decode entities such as `&amp;`."""


class Step(DocumentStep[Config]):
    config_type = Config
    repairs = True

    def apply(self, document: Document) -> Verdict | None:
        text = _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub("", document.text)))
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        if text == document.text:
            return None
        document.text = _BLANK_LINES.sub("\n\n", text).strip()
        return Verdict("removed", dropped=False)
