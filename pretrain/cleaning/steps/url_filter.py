"""Lists of domains, URLs and words in URLs, of datatrove."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from experiment.config import Section
from experiment.config.field_types import PathText
from experiment.csv_and_jsonl import unexpected_cell
from experiment.errors import UserError
from experiment.files import json_digest, read_items
from pretrain.cleaning.datatrove_step import FilterStep
from pretrain.cleaning.step import Document, ReadTask, Verdict

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

_LISTS = {"domains": "extra_domains", "urls": "extra_urls", "words": "banned_words", "soft_words": "soft_banned_words"}


class Config(Section):
    """Drop documents by the `url` in their metadata. Files have one item per line; `#` begins a comment."""

    domains: PathText | None = None
    """File with domains to drop, subdomains included."""

    urls: PathText | None = None
    """File with whole URLs to drop."""

    words: PathText | None = None
    """File with words that no URL may have."""

    soft_words: PathText | None = None
    """File with words of which a URL may have fewer than `soft_word_threshold`."""

    soft_word_threshold: PositiveInt = 2
    """Number of soft words at which a document is dropped."""

    built_in: bool = True
    """Use datatrove's lists of adult domains and words too, which take 0.8 GB of memory in each worker."""


class Step(FilterStep[Config]):
    config_type = Config
    packages = ("datatrove", "tldextract", "ahocorasick", "fasteners")
    needs = ("url",)

    def prepare(self, read_task: ReadTask) -> None:
        self.lists = {
            argument: _read_list(f"url_filter.{key}", path, of_words=key in ("words", "soft_words"))
            for key, argument in _LISTS.items()
            if (path := getattr(self.config, key)) is not None
        }
        self.domains = frozenset(map(str.lower, self.lists.get("extra_domains", ())))

    def facts(self) -> Mapping[str, Any]:
        """Return a digest of the lists: a cleaning by others is refused."""
        return {"lists": json_digest(self.lists)}

    def make_filter(self) -> "BaseFilter":
        from datatrove.pipeline.filters import URLFilter
        from tldextract import TLDExtract

        url_filter = URLFilter(self.config.soft_word_threshold, use_integrated_lists=self.config.built_in, **self.lists)
        url_filter.tldextractor = TLDExtract(suffix_list_urls=())  # the list in the package, not from the network
        try:
            url_filter.download_data()
        except (OSError, ValueError) as error:
            raise UserError(
                f"url_filter: cannot unpack the lists of datatrove: {error}; set HF_HOME to a folder that can be "
                "written, with 150 MB of free space, or built_in: false"
            ) from None
        return url_filter

    def apply(self, document: Document) -> Verdict | None:
        url = document.metadata.get("url")
        if not url:
            return Verdict("no_url")
        if not isinstance(url, str):
            raise unexpected_cell(document.id, "url", url)
        if self.domains and self._is_listed(url):
            return Verdict("domain")
        return super().apply(document) or self._verdict_of_words(url)

    def _verdict_of_words(self, url: str) -> Verdict | None:
        """Apply the rules for words, of which datatrove finds those in lower case."""
        words = set(re.findall("[a-z0-9]+", url.lower()))
        if words & self.filter.banned_words:
            return Verdict("hard_blacklisted")
        is_soft = len(words & self.filter.soft_banned_words) >= self.config.soft_word_threshold
        return Verdict("soft_blacklisted") if is_soft else None

    def _is_listed(self, url: str) -> bool:
        """Return whether the host or a domain that it belongs to is in `domains`: datatrove tests the host and its
        registered domain only, and distinguishes case."""
        found = self.filter.tldextractor(url)
        labels = ".".join((found.subdomain, found.domain, found.suffix)).lower().strip(".").split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))


def _read_list(key: str, path: str, of_words: bool) -> list[str]:
    items = [item for _, item in read_items(path, f"steps: {key}")]
    for item in items if of_words else ():
        if not re.search("[a-zA-Z0-9]", item) and not item.startswith("#"):  # datatrove drops all others
            raise UserError(f"steps: {key}: {path}: '{item}' has no letters or digits of ASCII, the only ones in words")
    return items
