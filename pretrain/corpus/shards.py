"""Encoded documents -> Arrow shards in a folder that is not yet a corpus, so that a killed build can go on.

    DIR.partial/shard-00000.arrow …   finished shards, on disk
    DIR.partial/journal.json          which they are, and up to which document of the source they reach

A shard closes at the first document that fills it. It is one record batch: its token ids lie in one piece that can be
memory-mapped, and its size bounds the memory of a build.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiment.errors import UserError
from experiment.files import fsync, sha256, write_json
from pretrain.corpus.encoding import Counts, Encoded, TokenIds
from pretrain.corpus.manifest import (
    Manifest,
    Recipe,
    Shard,
    percentiles,
    write_manifest,
)
from pretrain.corpus.words import BoolArray

SHARD_TOKENS = 32 * 2**20  # a shard closes at the first document that brings it here
JOURNAL = "journal.json"


class Position(NamedTuple):
    """A place in the stream of source documents: `documents` have been read, and their digest is `digest`."""

    documents: int
    digest: str


@dataclass(frozen=True)
class Finished:
    """A shard on disk, and how far the source had been read when it closed."""

    shard: Shard
    position: Position
    empty_documents: int  # those that gave no token, since the shard before


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


class ShardWriter:
    """Writes one corpus folder, shard by shard, beginning after the shards that an earlier build finished."""

    def __init__(self, folder: Path, token_type: str, arguments: dict[str, Any]) -> None:
        """`arguments`: what must be the same for finished shards to be of use. Raises UserError where it is not."""
        self.folder = folder
        self.partial = partial_folder(folder)
        self._token_type = token_type
        self._arguments = arguments
        self.finished = self._open_partial()
        self._resumed_at = self.finished[-1].position if self.finished else Position(0, "")
        self._ids: list[TokenIds] = []
        self._lengths: list[Counts] = []
        self._word_starts: list[BoolArray] = []
        self._tokens = self._unknown = self._words = self._text_bytes = self._empty = 0

    @property
    def resumed_at(self) -> Position:
        """Where the shards of the earlier build end."""
        return self._resumed_at

    def add(self, encoded: Encoded, text_bytes: Counts, positions: list[Position]) -> None:
        """Append D documents; `text_bytes` [D], `positions` [D]: the source's position after each."""
        if self.finished and self.finished[-1].shard.tokens < SHARD_TOKENS:
            raise UserError(
                f"the source has grown since the build in {self.partial} reached its end; "
                "delete that folder to start over"
            )
        first, token = 0, 0
        ends = np.cumsum(encoded.lengths)
        while first < len(ends):
            # The document that fills the shard is the last one in it.
            room = SHARD_TOKENS - self._tokens
            last = min(int(np.searchsorted(ends, token + room)), len(ends) - 1)
            here, end = slice(first, last + 1), int(ends[last])
            lengths = encoded.lengths[here]
            self._ids.append(encoded.ids[token:end])
            if encoded.word_starts is not None:
                self._word_starts.append(encoded.word_starts[token:end])
            self._lengths.append(lengths[lengths > 0])
            self._empty += int((lengths == 0).sum())
            self._tokens += end - token
            self._unknown += int(encoded.unknown[here].sum())
            self._words += int(encoded.words[here].sum())
            self._text_bytes += int(text_bytes[here].sum())
            first, token = last + 1, end
            if self._tokens >= SHARD_TOKENS:
                self._close(positions[last])

    def finish(self, recipe: Recipe, vocabulary_size: int, empty_documents: int, end: Position) -> Manifest:
        """Close the last shard and write what makes the partial folder a corpus. Raises UserError without any token."""
        if self._tokens:
            self._close(end)
        if not self.finished:
            raise UserError(f"no corpus {self.folder}: none of its documents has a token")
        lengths: Counter[int] = Counter()
        shards = []
        for index, entry in enumerate(self.finished):
            for length, count in zip(
                *np.unique(row_lengths(self.partial / entry.shard.file), return_counts=True), strict=True
            ):
                lengths[int(length)] += int(count)
            shards.append(replace(entry.shard, file=f"data-{index:05d}-of-{len(self.finished):05d}.arrow"))
        manifest = Manifest(
            recipe=recipe,
            vocabulary_size=vocabulary_size,
            token_type=self._token_type,
            empty_documents=empty_documents + self._empty + sum(entry.empty_documents for entry in self.finished),
            length_percentiles=percentiles(lengths.items()),
            shards=tuple(shards),
        )
        self._write_for_datasets(manifest)
        write_manifest(self.partial, manifest)
        return manifest

    def publish(self, manifest: Manifest) -> None:
        """Give the finished folder its name, in one step."""
        for entry, shard in zip(self.finished, manifest.shards, strict=True):
            (self.partial / entry.shard.file).replace(self.partial / shard.file)
        (self.partial / JOURNAL).unlink()
        fsync(self.partial)
        self.partial.replace(self.folder)
        fsync(self.folder.parent)

    def discard_if_useless(self) -> None:
        """Leave nothing behind where no shard was finished."""
        if not self.finished:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self, position: Position) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        index = len(self.finished)
        path = self.partial / f"shard-{index:05d}.arrow"
        ids = np.concatenate(self._ids)
        lengths = np.concatenate(self._lengths)
        word_starts = np.concatenate(self._word_starts) if self._word_starts else None
        write_shard(path, ids, lengths, word_starts)
        content = hashlib.sha256(lengths.data)
        content.update(ids.data)
        if word_starts is not None:
            content.update(np.packbits(word_starts).data)
        shard = Shard(
            file=path.name,
            rows=len(lengths),
            tokens=len(ids),
            unknown_tokens=self._unknown,
            words=self._words,
            text_bytes=self._text_bytes,
            bytes=path.stat().st_size,
            sha256=sha256(path),
            content=content.hexdigest(),
        )
        self.finished.append(Finished(shard, position, self._empty))
        write_json(
            self.partial / JOURNAL,
            {"arguments": self._arguments, "finished": [asdict(entry) for entry in self.finished]},
            indent=1,
        )
        self._ids, self._lengths, self._word_starts = [], [], []
        self._tokens = self._unknown = self._words = self._text_bytes = self._empty = 0

    def _open_partial(self) -> list[Finished]:
        """The shards of an earlier build that can be kept; everything else in the partial folder goes."""
        if not self.partial.is_dir():
            return []
        for path in self.partial.glob("data-*-of-*.arrow"):  # killed while it was being published
            path.replace(path.with_name(f"shard-{path.name[5:10]}.arrow"))
        finished = list(_intact(self.partial, _read_journal(self.partial, self._arguments)))
        kept = {JOURNAL, *(entry.shard.file for entry in finished)} if finished else set()
        for path in self.partial.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return finished

    def _write_for_datasets(self, manifest: Manifest) -> None:
        """What `datasets.load_from_disk` reads beside the shards."""
        types = {"input_ids": self._token_type}
        if manifest.recipe.segmenter is not None:
            types["word_starts"] = "bool"
        features = {
            column: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"} for column, dtype in types.items()
        }
        write_json(
            self.partial / "dataset_info.json",
            {"citation": "", "description": "", "features": features, "homepage": "", "license": ""},
            indent=1,
        )
        write_json(
            self.partial / "state.json",
            {
                "_data_files": [{"filename": shard.file} for shard in manifest.shards],
                "_fingerprint": manifest.fingerprint[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            },
            indent=1,
        )


def _read_journal(partial: Path, arguments: dict[str, Any]) -> list[Finished]:
    try:
        found = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    for name, value in arguments.items():
        before = found["arguments"].get(name)
        if before != value:
            raise UserError(
                f"{partial} holds an unfinished build with another {name} ({before}, now {value}); "
                f"give the same arguments to go on with it, or delete {partial} to start over"
            )
    return [
        Finished(Shard(**entry["shard"]), Position(*entry["position"]), entry["empty_documents"])
        for entry in found["finished"]
    ]


def _intact(partial: Path, finished: list[Finished]) -> Iterator[Finished]:
    """The shards up to the first that is not what the journal says."""
    for entry in finished:
        path = partial / entry.shard.file
        if not path.is_file() or path.stat().st_size != entry.shard.bytes or sha256(path) != entry.shard.sha256:
            return
        yield entry


class MappedShard(NamedTuple):
    """A shard on disk, memory-mapped: nothing is read before it is asked for."""

    ids: TokenIds  # [tokens]
    offsets: npt.NDArray[np.int32]  # [rows + 1] where documents begin and the last one ends
    word_starts: npt.NDArray[np.uint8] | None  # [at least tokens / 8] a bit a token, the lowest first


def write_shard(path: Path, ids: TokenIds, lengths: Counts, word_starts: BoolArray | None = None) -> None:
    """One Arrow stream of one record batch, on disk when this returns.

    `input_ids: list<uint16 | uint32>` and, where they are given, `word_starts: list<bool>`, a bit a token.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))}
    if word_starts is not None:
        columns["word_starts"] = pa.ListArray.from_arrays(offsets, pa.array(word_starts))
    batch = pa.record_batch(columns)
    with path.open("wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    fsync(path)


def map_shard(path: Path) -> MappedShard:
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_stream(file).read_next_batch()
    column = batch.column("input_ids")
    word_starts = None
    if "word_starts" in batch.schema.names:
        word_starts = np.frombuffer(batch.column("word_starts").values.buffers()[1], dtype=np.uint8)
    return MappedShard(
        column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True), word_starts
    )


def row_lengths(path: Path) -> npt.NDArray[np.int32]:
    """Tokens of each document of a shard, [rows]."""
    return np.diff(map_shard(path).offsets)
