"""Masking of personal data with datatrove."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from experiment.config import Section
from pretrain.cleaning.step import Document, DocumentStep, Verdict, changed

if TYPE_CHECKING:
    from datatrove.pipeline.formatters import PIIFormatter

# An address has at most 64 characters before its @ (RFC 5321); addresses of bounced mail may be longer. Without a
# limit, the pattern searches from each word to the end of a text such as "a.a.a.…", which takes quadratic time.
_LOCAL_PART_FOLLOWS = r"(?=[^@\s]{1,256}@)"
# A part of a longer number, such as of an object identifier, is no address.
_NO_NUMBER_BEFORE, _NO_NUMBER_AFTER = r"(?<!\d)(?<!\d\.)", r"(?!\.?\d)"


class Config(Section):
    """Replace email addresses and public IPv4 addresses."""

    remove_emails: bool = True
    """Replace email addresses."""

    remove_ips: bool = True
    """Replace public IPv4 addresses, and what looks like them, such as the number of a section 5.3.2.1."""

    email_replacement: Annotated[str, Field(min_length=1)] = "email@example.com"
    """Replacement of email addresses."""

    ip_replacement: Annotated[str, Field(min_length=1)] = "192.0.2.1"
    """Replacement of IP addresses; the default is reserved for documentation (RFC 5737)."""


class Step(DocumentStep[Config]):
    config_type = Config
    packages = ("datatrove",)
    masks = True

    @cached_property
    def formatter(self) -> "PIIFormatter":
        from datatrove.pipeline.formatters import PIIFormatter

        formatter = PIIFormatter(**self.config.model_dump())
        emails, ips = formatter.emails_replacer, formatter.ip_replacer
        # For ASCII, a Chinese character is the border of a word.
        emails.regex = re.compile(_LOCAL_PART_FOLLOWS + emails.regex.pattern, re.ASCII)
        ips.regex = re.compile(_NO_NUMBER_BEFORE + ips.regex.pattern + _NO_NUMBER_AFTER)
        return formatter

    def apply(self, document: Document) -> Verdict | None:
        return changed(document, self.formatter.format(document.text), "masked")
