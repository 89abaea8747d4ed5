"""A digest of a sequence of documents that can be computed in parts."""

from dataclasses import dataclass

import xxhash

_PRIME = (1 << 127) - 1
_BASE = 0x2F4C1B8D5E7A93061D2B4F6A8C0E1357  # any number; another one gives other digests


@dataclass
class SourceDigest:
    """Identifies documents and their order, whatever the files and splits that they come from.

    A polynomial of the documents' hashes, as of Rabin and Karp: two sequences' digests give the digest of both.
    """

    documents: int = 0
    value: int = 0

    def add(self, text: bytes) -> None:
        """Append a document."""
        self.extend(SourceDigest(1, xxhash.xxh3_128_intdigest(text)))

    def extend(self, other: "SourceDigest") -> None:
        """Append documents."""
        self.value = (self.value * pow(_BASE, other.documents, _PRIME) + other.value) % _PRIME
        self.documents += other.documents

    def __str__(self) -> str:
        return f"{self.documents}-{self.value:032x}"
