"""The folder of an unfinished build, which tasks on several machines write at the same time.

DIR.partial/build.json                  arguments of the build
DIR.partial/KEY.count.json              a split that was counted; only if documents are sampled
DIR.partial/KEY-SAMPLE-main-000.arrow … the pieces of a split, by part
DIR.partial/KEY.json                    its record: the split is finished
DIR.partial/main/data-0000I-of-0000N.arrow    a shard, for which pieces were joined
DIR.partial/main-data-0000I-….json      its record: the pieces are no longer needed
DIR.partial/main/                       becomes the corpus

KEY depends on the text of a split, SAMPLE on which of its documents are in each part.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from experiment.errors import UserError, notify
from experiment.files import create_json, names_in, parse_record, write_json
from pretrain.corpus.build_plan import ARGUMENTS, Part
from pretrain.corpus.formats import Members
from pretrain.corpus.manifest import Shard
from pretrain.corpus.shards import Piece
from pretrain.corpus.source_digest import SourceDigest
from pretrain.corpus.splits import Split

T = TypeVar("T")

_KEY = re.compile(r"[0-9a-f]{32}")  # of a split; its files begin with it
_OF_SOURCE = {"source", "hub"}  # arguments that are in the keys of splits
_OF_SAMPLE = {"limit", "holdout", "seed"}  # arguments that the count of a split does not depend on


class SplitTask(NamedTuple):
    """A split to tokenize. `parts`: an index of PART_CODES for each document; empty: all are in the main corpus."""

    split: Split
    parts: bytes

    @property
    def place(self) -> str:
        """Where its documents are, for messages."""
        return f"documents from {self.split.spans[0].source.name} on"


class ShardTask(NamedTuple):
    """Pieces to join to a shard."""

    part: Part
    file: str
    pieces: tuple[Piece, ...]

    @property
    def record(self) -> str:
        """The file that tells that the shard was joined."""
        return f"{self.part}-{self.file}.json"


@dataclass(frozen=True)
class SplitCount:
    """The documents of a split that have a token."""

    key: str
    source: SourceDigest
    text_bytes: int


@dataclass(frozen=True)
class SplitRecord:
    """The input and output of a split."""

    key: str
    parts: str  # digest of `SplitTask.parts`
    source: SourceDigest
    text_bytes: int
    empty_documents: int
    start_matches: int
    archives: dict[str, Members]
    pieces: dict[Part, list[Piece]]
    unknown_texts: dict[str, int] = field(default_factory=dict)  # the most frequent ones of a sample of the main corpus


@dataclass(frozen=True)
class ShardRecord:
    """A shard, the files of its pieces, and how many documents have each length in tokens."""

    part: Part
    shard: Shard
    pieces: list[str]
    lengths: list[tuple[int, int]]


def open_partial(folder: Path, arguments: Mapping[str, Any], splits: Sequence[Split]) -> None:
    """Create the folder of an unfinished build, or resume one. Raises UserError if it holds work of other arguments.
    Before a split is tokenized, the sample may be another one; another source is one of which no split can be used."""
    folder.mkdir(parents=True, exist_ok=True)
    create_json(folder / ARGUMENTS, arguments)
    # Before the arguments are read: a task that replaces them may write something right after.
    has_work, has_tokenized = holds_work(folder), holds_work(folder, counts=False)
    names = set(names_in(folder))
    found = read_record(folder / ARGUMENTS, dict[str, Any]) or {}
    usable = has_work and sum(
        not names.isdisjoint((f"{split.key}.json", f"{split.key}.count.json")) for split in splits
    )
    may_change = (_OF_SOURCE if usable else set()) | (set() if has_tokenized else _OF_SAMPLE)
    changed = [name for name, value in arguments.items() if found.get(name) != value]
    for name in changed:
        if has_work and name not in may_change:
            difference = "" if name == "source" else f" (found {found.get(name)}, expected {arguments[name]})"
            raise UserError(
                f"{folder} holds an unfinished build with another {name}{difference}; "
                f"use the same arguments to resume it, or delete {folder} to start over"
            )
    if changed:
        if not has_work:  # but perhaps records of splits without a token, which other arguments may find there
            for name in filter(_KEY.match, names):
                (folder / name).unlink(missing_ok=True)
        write_json(folder / ARGUMENTS, arguments)
    if usable and "source" in changed:
        notify(f"--source names other files than before: {usable:,} of {len(splits):,} splits are the same")


def holds_work(folder: Path, counts: bool = True) -> bool:
    """Return whether a build has tokenized something that a later one could use or, with `counts`, has counted
    documents."""
    return any(".arrow" in name or (counts and name.endswith(".count.json")) for name in names_in(folder))


def write_count(folder: Path, count: SplitCount) -> None:
    """Record the number of documents of a split."""
    write_json(folder / f"{count.key}.count.json", asdict(count), durable=False)


def read_counts(folder: Path, keys: Iterable[str]) -> dict[str, SplitCount]:
    """Read the counts of those splits that were counted, by key."""
    names = set(names_in(folder))
    files = (f"{key}.count.json" for key in keys)
    counts = [read_record(folder / file, SplitCount) for file in files if file in names]
    return {count.key: count for count in counts if count}


def read_finished(folder: Path, tasks: Iterable[SplitTask]) -> dict[str, SplitRecord]:
    """Read the records of those splits that are finished, by key: their pieces are there, or joined to shards."""
    names, finished = set(names_in(folder)), {}
    pieces = names | {piece for _, shard in _shards(folder, names) for piece in shard.pieces}
    for split, parts in tasks:
        if f"{split.key}.json" in names and (record := read_record(folder / f"{split.key}.json", SplitRecord)):
            written = (piece.file for of_part in record.pieces.values() for piece in of_part)
            if record.parts == parts_digest(parts) and all(file in pieces for file in written):
                finished[split.key] = record
    return finished


def forget_split_of(folder: Path, file: str) -> None:
    """Delete the record of the split that a damaged piece belongs to."""
    (folder / f"{_split_key(file)}.json").unlink(missing_ok=True)


def forget_other_splits(folder: Path, splits: Iterable[Split]) -> None:
    """Delete the files of other splits than these, such as of a source that has changed, and records of shards with
    their text."""
    keys = {split.key for split in splits}
    names = names_in(folder)
    for name, shard in _shards(folder, names):
        if any(_split_key(piece) not in keys for piece in shard.pieces):
            (folder / name).unlink()
    for name in names:
        if (found := _KEY.match(name)) and found[0] not in keys:
            (folder / name).unlink()


def forget_other_shards(folder: Path, tasks: Iterable[ShardTask]) -> bool:
    """Delete the records of shards that were joined of other pieces: a source has changed. Returns whether there were
    any."""
    expected = {task.record: [piece.file for piece in task.pieces] for task in tasks}
    others = [name for name, shard in _shards(folder, names_in(folder)) if expected.get(name) != shard.pieces]
    for name in others:
        (folder / name).unlink()
    return bool(others)


def read_record(path: Path, kind: type[T]) -> T | None:
    """Read a record. None if there is none, or a power cut has damaged it: records are not synced to the disk."""
    try:
        return parse_record(kind, path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def parts_digest(parts: bytes) -> str:
    """Return the digest of `SplitTask.parts`."""
    return xxhash.xxh3_64_hexdigest(parts)


def _split_key(piece: str) -> str:
    """Return the key of the split that a piece belongs to, by the name of its file."""
    return piece.partition("-")[0]


def _shards(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, ShardRecord]]:
    for name in names:
        if name.endswith(".arrow.json") and (found := read_record(folder / name, ShardRecord)):
            yield name, found
