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


def is_clean_summary(path: Path) -> bool:
    """Whether a file is the clean.json of `deepcloze clean`, which is not text for a corpus."""
    return path.name == CLEAN_SUMMARY and _read_summary(path) is not None


def read_decontamination(folder: Path) -> dict[str, str] | None:
    """Task -> digest of its texts, of all tasks that the documents in a folder of `deepcloze clean` were decontaminated
    against; None if the folder was not written by it."""
    summary = _read_summary(folder / CLEAN_SUMMARY)
    if summary is None:
        return None
    return {name: str(digest) for step in summary["steps"] for name, digest in step.get("against", {}).items()}


def _read_summary(path: Path) -> Mapping[str, Any] | None:
    """The content of clean.json; None for a file of another kind, such as JSON Lines."""
    try:
        summary = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(summary, dict) and {"recipe", "read", "kept", "steps"} <= summary.keys()
    return summary if is_ours else None
