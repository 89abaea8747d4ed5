"""The tasks that a corpus was decontaminated against: digests of evaluation texts, in clean.json, in manifests, and in
the deepcloze.json of models."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from posixpath import basename, dirname
from typing import IO, Any, NamedTuple

import xxhash

from experiment.errors import UserError, reason
from experiment.files import parse_json
from experiment.run_files.provenance import read_origin
from experiment.storage import DeniedError, MissingError, join, open_file

CLEAN_SUMMARY = "clean.json"
"""The file beside cleaned documents that says how they were cleaned."""
CLEAN_PAGE = "report.html"
"""The same as a page."""
CleanSummary = Mapping[str, Any]
"""The content of clean.json."""
_LINE_BYTES = 1 << 26  # no line of clean.json is as long


class EvaluationText(NamedTuple):
    """A text that a model is evaluated on."""

    split: str
    place: str  # file and row
    text: str


def texts_digests(texts: Collection[EvaluationText]) -> dict[str, str]:
    """Return a checksum of the set of texts of each split, whatever their order: a task may be evaluated on one split
    only, as in a watch."""
    # The prefix changes if decontamination finds or removes other texts.
    digests = {text.split: xxhash.xxh3_128(b"whole lines\0") for text in texts}
    for split, text in sorted({(text.split, text.text) for text in texts}):
        digests[split].update(text.encode() + b"\0")
    return {split: digest.hexdigest() for split, digest in digests.items()}


def is_clean_summary(name: str) -> bool:
    """Return whether a file, a path or URL, is the clean.json of `deepcloze clean`, which is not text for a corpus."""
    return basename(name) == CLEAN_SUMMARY and read_clean_summary(dirname(name) or ".") is not None


def read_clean_summary(folder: str) -> CleanSummary | None:
    """Return the clean.json of a folder, a path or URL; None if the folder was not written by `deepcloze clean`: the
    file is missing, or of another kind, such as JSON Lines. Raises UserError if it is damaged: empty, or neither of
    them, and if it cannot be read: documents that were decontaminated would count as others."""
    path = join(folder, CLEAN_SUMMARY)
    try:
        with open_file(path) as file:
            summary = _parse_summary(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, MissingError, DeniedError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UserError:  # which is a ValueError
        raise
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. It says what the documents were decontaminated against: delete the folder "
            "and clean them again"
        ) from None
    return summary if is_summary(summary) else None


def _parse_summary(file: IO[bytes]) -> Any:
    """Return the value of a JSON file, or of the first line of JSON Lines, which may be larger than memory; None if
    that line is too long for a clean.json. Raises ValueError."""
    line = file.readline(_LINE_BYTES)
    with suppress(ValueError):
        return parse_json(line)
    return parse_json(line + file.read()) if len(line) < _LINE_BYTES else None


def common_decontamination(summaries: Collection[CleanSummary | None]) -> dict[str, str] | None:
    """Split of a task -> digest of its texts, of the splits against which documents from several folders were all
    decontaminated: for the manifest of a corpus of them, under the key `decontaminated`. None if none of the folders
    was written by `deepcloze clean`.

    summaries: the clean.json of each folder; None for another folder, or a source that is not a file.
    """
    if not any(summaries):
        return None
    found = [_tasks_of(summary) if summary else {} for summary in summaries]
    shared = set[str].intersection(*({*tasks.values()} for tasks in found))
    return {name: digest for tasks in found for name, digest in tasks.items() if digest in shared}


def _tasks_of(summary: CleanSummary) -> dict[str, str]:
    """Return the splits of tasks of the steps, and of the cleaning of the sources."""
    each = (summary.get("decontaminated", {}), *(step.get("against", {}) for step in summary["steps"]))
    return {name: str(digest) for tasks in each for name, digest in tasks.items()}


def decontamination_of(model: Path) -> list[tuple[str, Sequence[str]]]:
    """Return (corpus, digests of the texts of splits) for all corpora of which that is known, and on which a model or
    its ancestors were pretrained.

    model: a Hugging Face folder. Raises UserError if its deepcloze.json is damaged.
    """
    origin = read_origin(model)
    runs = [] if origin is None else [*origin["ancestors"], origin]
    return [corpus for run in runs for corpus in run.get("decontaminated", {}).items()]


def is_summary(found: object) -> bool:
    """Return whether this is what `deepcloze clean` writes to clean.json."""
    return isinstance(found, dict) and {"recipe", "read", "kept", "steps"} <= found.keys()
