"""The folder of an unfinished build, which tasks on several machines write at the same time.

DIR.partial/build.json                  arguments of the build
DIR.partial/KEY.count.json              a split that was counted; only if documents are sampled
DIR.partial/KEY-main-000.arrow …        the pieces of a split, by part
DIR.partial/KEY.json                    its record: the split is finished
DIR.partial/main/data-0000I-of-0000N.arrow    a shard, for which pieces were joined
DIR.partial/main-data-0000I-….json      its record: the pieces are not needed any more
DIR.partial/main/                       becomes the corpus
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import create_json, write_json
from pretrain.corpus.formats import Members
from pretrain.corpus.shards import Piece
from pretrain.corpus.source_digest import SourceDigest
from pretrain.corpus.tasks import ShardTask, SplitCount, SplitRecord, SplitTask, parts_digest, read_record

_ARGUMENTS = "build.json"


def open_partial(folder: Path, arguments: Mapping[str, str | int | None]) -> None:
    """Create the folder of an unfinished build, or resume one. Raises UserError if it had other arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "journal.json").exists():
        raise UserError(f"{folder} holds an unfinished build of an earlier version; delete it to start over")
    create_json(folder / _ARGUMENTS, arguments)
    found = read_record(folder / _ARGUMENTS)
    if found != arguments and not holds_work(folder, counts=False):
        shutil.rmtree(folder)
        write_json(folder / _ARGUMENTS, arguments)
        return
    for name, value in arguments.items():
        if found.get(name) != value:
            difference = "" if name == "source" else f" (found {found.get(name)}, expected {value})"
            raise UserError(
                f"{folder} holds an unfinished build with another {name}{difference}; "
                f"use the same arguments to resume it, or delete {folder} to start over"
            )


def holds_work(folder: Path, counts: bool) -> bool:
    """Whether a build has written something that a later one could use, if `counts` also counts of documents."""
    names = _names(folder) if folder.is_dir() else ()
    return any(".arrow" in name or (counts and name.endswith(".count.json")) for name in names)


def write_count(folder: Path, count: SplitCount) -> None:
    """Record the number of documents of a split."""
    write_json(folder / f"{count.key}.count.json", asdict(count), durable=False)


def read_counts(folder: Path, keys: Iterable[str]) -> dict[str, SplitCount]:
    """Read the counts of those splits that were counted, by key."""
    names, counts = _names(folder), {}
    for key in keys:
        if f"{key}.count.json" in names and (found := read_record(folder / f"{key}.count.json")):
            counts[key] = SplitCount(**found | {"source": SourceDigest(**found["source"])})
    return counts


def read_finished(folder: Path, tasks: Iterable[SplitTask]) -> dict[str, SplitRecord]:
    """Read the records of those splits that are finished, by key: their pieces are there, or joined to shards."""
    names, finished = _names(folder), {}
    pieces = names | {piece for _, shard in _shards(folder, names) for piece in shard["pieces"]}
    for split, parts in tasks:
        key = split.key
        if f"{key}.json" in names and (found := read_record(folder / f"{key}.json")):
            record = _split_record(found)
            written = (piece.file for found in record.pieces.values() for piece in found)
            if record.parts == parts_digest(parts) and all(file in pieces for file in written):
                finished[key] = record
    return finished


def forget_piece(folder: Path, file: str) -> None:
    """Delete the record of the split that a damaged piece belongs to."""
    key = file.partition("-")[0]
    (folder / f"{key}.json").unlink(missing_ok=True)


def forget_other_shards(folder: Path, tasks: Iterable[ShardTask]) -> bool:
    """Delete the records of shards that were joined of other pieces: a source has changed. Returns whether there were
    any."""
    expected = {(part, file): [piece.file for piece in pieces] for part, file, pieces in tasks}
    others = [
        name
        for name, shard in _shards(folder, _names(folder))
        if expected.get((shard["part"], shard["shard"]["file"])) != shard["pieces"]
    ]
    for name in others:
        (folder / name).unlink()
    return bool(others)


def is_joined(folder: Path, task: ShardTask) -> bool:
    """Whether a shard has a record: it was joined."""
    return (folder / f"{task.part}-{task.file}.json").exists()


def _shards(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        if name.endswith(".arrow.json") and (found := read_record(folder / name)):
            yield name, found


def _split_record(found: dict[str, Any]) -> SplitRecord:
    return SplitRecord(
        **found
        | {
            "source": SourceDigest(**found["source"]),
            "archives": {name: Members(**members) for name, members in found["archives"].items()},
            "pieces": {part: [Piece(**piece) for piece in pieces] for part, pieces in found["pieces"].items()},
        }
    )


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder))  # noqa: PTH208  (a Path per file takes longer)
