"""Origins of a corpus's documents: the shares of its sources, and the cleaning of cleaned ones."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from posixpath import dirname
from typing import Any

from experiment.decontamination import (
    CLEAN_SUMMARY,
    CleanSummary,
    common_decontamination,
    is_summary,
    read_clean_summary,
)
from experiment.errors import UserError
from experiment.files import read_json, write_json
from pretrain.corpus.manifest import SourceShare
from pretrain.corpus.shards import Piece
from pretrain.corpus.sources import Source

_EXAMPLES = 20  # of a rule, over all folders, but one of each at least


def source_shares(pieces: Iterable[tuple[Source, Sequence[Piece]]]) -> tuple[SourceShare, ...]:
    """Sum the pieces of splits by item of `--source`. Empty if items are not counted."""
    counts: dict[str, list[int]] = {}
    for source, written in pieces:
        count = counts.setdefault(source.item, [0, 0])
        for piece in written:
            count[0] += piece.rows
            count[1] += piece.tokens
    if "" in counts:
        return ()
    return tuple(map(SourceShare, short_names(list(counts)), *zip(*counts.values(), strict=True)))


def read_cleanings(sources: Iterable[Source]) -> tuple[list[CleanSummary], dict[str, str] | None]:
    """Read the cleaning of each source folder, without the list of matches and with a short name as `folder` if there
    are several, and the texts that all documents were decontaminated against; see `common_decontamination`."""
    folders = dict.fromkeys((dirname(source.name) or ".") if source.kind == "file" else None for source in sources)
    summaries = {folder: None if folder is None else read_clean_summary(folder) for folder in folders}
    found = {folder: summary for folder, summary in summaries.items() if folder is not None and summary is not None}
    names = short_names(list(found)) if len(found) > 1 else [""]
    examples = max(1, _EXAMPLES // max(1, len(found)))
    cleanings: list[CleanSummary] = [
        {"folder": name, **_shortened(summary, examples)} for name, summary in zip(names, found.values(), strict=False)
    ]
    return cleanings, common_decontamination(summaries.values())


def write_cleanings(folder: Path, cleanings: Sequence[CleanSummary]) -> None:
    """Write `clean.json` of a corpus, unless none of its sources was cleaned."""
    if cleanings:
        write_json(folder / CLEAN_SUMMARY, cleanings, indent=1)


def cleanings_of(corpus: Path) -> list[CleanSummary]:
    """Read the output of `write_cleanings`; empty without any. Raises UserError if it is damaged."""
    path = corpus / CLEAN_SUMMARY
    try:
        found = read_json(path)
        if not isinstance(found, list) or not all(map(is_summary, found)):
            raise ValueError("expected a list of cleanings")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of paths, as many as tell them apart, and one without wildcards: the same names in any
    folder."""
    paths = [name.partition("::") for name in names]
    parts = [path.rstrip("/").split("/") for path, *_ in paths]
    for count in range(1, max(map(len, parts), default=0)):
        short = [path_parts[-count:] for path_parts in parts]
        if len(set(map(tuple, short))) == len(names) and not any(glob.has_magic(first) for first, *_ in short):
            return ["/".join(last) + "".join(member) for last, (_, *member) in zip(short, paths, strict=True)]
    return list(names)


def _shortened(summary: CleanSummary, examples: int) -> dict[str, Any]:
    steps = [
        {
            **{key: value for key, value in step.items() if key != "matches"},
            "rules": {
                name: {**rule, "examples": rule["examples"][:examples]} for name, rule in step.get("rules", {}).items()
            },
        }
        for step in summary["steps"]
    ]
    return {**summary, "steps": steps}
