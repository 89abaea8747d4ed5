"""What a corpus was decontaminated against: digests of evaluation texts, in clean.json and in manifests."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from experiment.files import parse_json

CLEAN_SUMMARY = "clean.json"
"""The file beside cleaned documents that says how they were cleaned."""


def texts_digest(texts: Iterable[str]) -> str:
    """A checksum of the set of texts, whatever their order."""
    digest = xxhash.xxh3_128()
    for text in sorted(set(texts)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def read_decontamination(folder: Path) -> dict[str, str] | None:
    """Task -> digest of its texts, of all tasks that the documents in a folder of `deepcloze clean` were decontaminated
    against; None if the folder was not written by it."""
    try:
        summary = parse_json((folder / CLEAN_SUMMARY).read_bytes())
        steps: list[Mapping[str, Any]] = summary["steps"]
        return {name: str(digest) for step in steps for name, digest in step.get("against", {}).items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
