"""The tasks that a corpus was decontaminated against: digests of evaluation texts, in clean.json and in manifests."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml

from experiment.config.yaml_dialect import read_yaml
from experiment.files import parse_json
from experiment.run_folder import RunFolder
from experiment.storage import StorageError, join, open_file

CLEAN_SUMMARY = "clean.json"
"""The file beside cleaned documents that says how they were cleaned."""
CLEAN_PAGE = "report.html"
"""The same as a page."""


def texts_digest(texts: Iterable[str]) -> str:
    """A checksum of the set of texts, whatever their order."""
    digest = xxhash.xxh3_128()
    for text in sorted(set(texts)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def is_clean_summary(name: str) -> bool:
    """Whether a file, a path or URL, is the clean.json of `deepcloze clean`, which is not text for a corpus."""
    return name.rpartition("/")[2] == CLEAN_SUMMARY and _read_summary(name) is not None


def read_clean_summary(folder: str) -> Mapping[str, Any] | None:
    """The clean.json of a folder, a path or URL; None if the folder was not written by `deepcloze clean`."""
    return _read_summary(join(folder, CLEAN_SUMMARY))


def read_decontamination(
    folder: str, read: Callable[[str], Mapping[str, Any] | None] = read_clean_summary
) -> dict[str, str] | None:
    """Task -> digest of its texts, of all tasks that the documents in a folder of `deepcloze clean` were decontaminated
    against; None if the folder, a path or URL, was not written by it."""
    summary = read(folder)
    if summary is None:
        return None
    return {name: str(digest) for step in summary["steps"] for name, digest in step.get("against", {}).items()}


def common_decontamination(
    folders: Iterable[str | None], read: Callable[[str], Mapping[str, Any] | None] = read_clean_summary
) -> dict[str, str] | None:
    """The tasks against which documents from several folders were all decontaminated: for the manifest of a corpus of
    them, under the key `decontaminated`. None if none of the folders was written by `deepcloze clean`.

    folders: the folders of the source files; None for a source that is not a file. read: gives their clean.json.
    """
    found = [None if folder is None else read_decontamination(folder, read) for folder in set(folders)]
    if all(tasks is None for tasks in found):
        return None
    shared = set[str].intersection(*({*(tasks or {}).values()} for tasks in found))
    return {name: digest for tasks in found for name, digest in (tasks or {}).items() if digest in shared}


def decontamination_of(model: Path) -> dict[str, Mapping[str, str]]:
    """Corpus -> task -> digest of its texts, of the corpora that a model was pretrained on and whose manifest says it.

    model: a Hugging Face folder; nothing is known if it is not in a checkpoint of a run with its config and corpora.
    """
    run = RunFolder(model.resolve().parents[2]) if len(model.resolve().parents) > 2 else None
    try:
        config = {} if run is None else read_yaml(run.config.read_text(encoding="utf-8"))
        trained_on = config["corpus"]["train"]
        names = [trained_on] if isinstance(trained_on, str) else [str(part["path"]) for part in trained_on]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return {}
    return {name: tasks for name in names if (tasks := _recorded(Path(name))) is not None}


def _recorded(corpus: Path) -> Mapping[str, str] | None:
    """The tasks in the manifest of a corpus; None if nothing is known."""
    try:
        found = parse_json((corpus / "manifest.json").read_bytes())["decontaminated"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _read_summary(name: str) -> Mapping[str, Any] | None:
    """The content of clean.json; None for a file of another kind, such as JSON Lines."""
    try:
        with open_file(name) as file:
            summary = parse_json(file.read())
    except (OSError, StorageError, ValueError):
        return None
    is_ours = isinstance(summary, dict) and {"recipe", "read", "kept", "steps"} <= summary.keys()
    return summary if is_ours else None
