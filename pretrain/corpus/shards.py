"""Write encoded documents as Arrow shards, in a folder that becomes a corpus when it is complete.

    DIR.partial/shard-00000.arrow …   finished shards
    DIR.partial/journal.json          lists them and how far into the source they reach, to resume a killed build

A shard is closed after the document that fills it. It holds one record batch, so its token ids are contiguous and can
be memory-mapped. The size of a shard bounds the memory of a build.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiment.errors import UserError
from experiment.files import atomic_write, fsync, parse_json, sha256, write_json
from pretrain.corpus.manifest import Manifest, Recipe, Shard, percentiles, write_manifest
from pretrain.corpus.tokenization import EncodedBatch
from pretrain.corpus.word_cache import Counts, TokenIds
from pretrain.corpus.words import BoolArray

SHARD_TOKENS = 32 * 2**20  # close a shard at the first document that reaches this
JOURNAL = "journal.json"


class SourcePosition(NamedTuple):
    """A position in the stream of source documents: how many were read, and a digest of all of them."""

    documents: int
    digest: str


@dataclass(frozen=True)
class FinishedShard:
    """An entry of the journal: a shard on disk, and the source position when it was closed."""

    shard: Shard
    position: SourcePosition
    empty_documents: int  # documents without a token since the previous shard


@dataclass
class _OpenShard:
    """Documents of the shard that is being filled."""

    ids: list[TokenIds] = field(default_factory=list)
    lengths: list[Counts] = field(default_factory=list)
    word_starts: list[BoolArray] = field(default_factory=list)
    tokens: int = 0
    unknown: int = 0
    words: int = 0
    text_bytes: int = 0
    empty_documents: int = 0


class ShardWriter:
    """Writes one corpus folder, shard by shard. Resumes after the finished shards of an earlier build."""

    def __init__(self, folder: Path, token_type: str, arguments: Mapping[str, str | int | None]) -> None:
        """`arguments` must equal those of the earlier build, or this raises UserError."""
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self._token_type = token_type
        self._arguments = dict(arguments)
        self.finished = self._open_partial()
        # The source position after the last shard of the earlier build.
        self.resumed_at = self.finished[-1].position if self.finished else SourcePosition(0, "")
        self._open = _OpenShard()

    def add(self, batch: EncodedBatch, text_bytes: Counts, positions: list[SourcePosition]) -> None:
        """Append D documents. `text_bytes` [D]: UTF-8 bytes of each; `positions` [D]: source position after each."""
        if self.finished and self.finished[-1].shard.tokens < SHARD_TOKENS:
            raise UserError(
                f"the source has grown since the build in {self.partial} reached its end; "
                "delete that folder to start over"
            )
        first, token = 0, 0
        ends = np.cumsum(batch.lengths)
        while first < len(ends):
            # The document that fills the shard is the last one in it.
            room = SHARD_TOKENS - self._open.tokens
            last = min(int(np.searchsorted(ends, token + room)), len(ends) - 1)
            documents, end = slice(first, last + 1), int(ends[last])
            self._append(batch, documents, slice(token, end))
            self._open.text_bytes += int(text_bytes[documents].sum())
            first, token = last + 1, end
            if self._open.tokens >= SHARD_TOKENS:
                self._close(positions[last])

    def finish(self, recipe: Recipe, vocabulary_size: int, empty_documents: int, end: SourcePosition) -> Manifest:
        """Close the last shard and write the manifest. Raises UserError if there is no token at all."""
        if self._open.tokens:
            self._close(end)
        if not self.finished:
            raise UserError(f"cannot build {self.folder}: none of its documents has a token")
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
            empty_documents=empty_documents
            + self._open.empty_documents
            + sum(entry.empty_documents for entry in self.finished),
            length_percentiles=percentiles(lengths.items()),
            shards=tuple(shards),
        )
        _write_datasets_metadata(self.partial, manifest)
        write_manifest(self.partial, manifest)
        return manifest

    def publish(self, manifest: Manifest) -> None:
        """Rename the finished partial folder to the corpus folder, in one step."""
        for entry, shard in zip(self.finished, manifest.shards, strict=True):
            (self.partial / entry.shard.file).replace(self.partial / shard.file)
        (self.partial / JOURNAL).unlink()
        fsync(self.partial)
        self.partial.replace(self.folder)
        fsync(self.folder.parent)

    def remove_if_empty(self) -> None:
        """Remove the partial folder if no shard was finished."""
        if not self.finished:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _append(self, batch: EncodedBatch, documents: slice, tokens: slice) -> None:
        """Add some documents of a batch, and their tokens, to the open shard."""
        shard, lengths = self._open, batch.lengths[documents]
        shard.ids.append(batch.ids[tokens])
        if batch.word_starts is not None:
            shard.word_starts.append(batch.word_starts[tokens])
        shard.lengths.append(lengths[lengths > 0])
        shard.empty_documents += int((lengths == 0).sum())
        shard.tokens += int(lengths.sum())
        shard.unknown += int(batch.unknown[documents].sum())
        shard.words += int(batch.words[documents].sum())

    def _close(self, position: SourcePosition) -> None:
        """Write the open shard and record it in the journal."""
        self.partial.mkdir(parents=True, exist_ok=True)
        path = self.partial / f"shard-{len(self.finished):05d}.arrow"
        ids = np.concatenate(self._open.ids)
        lengths = np.concatenate(self._open.lengths)
        word_starts = np.concatenate(self._open.word_starts) if self._open.word_starts else None
        write_shard(path, ids, lengths, word_starts)
        content = hashlib.sha256(lengths.data)
        content.update(ids.data)
        if word_starts is not None:
            content.update(np.packbits(word_starts).data)
        shard = Shard(
            file=path.name,
            rows=len(lengths),
            tokens=len(ids),
            unknown_tokens=self._open.unknown,
            words=self._open.words,
            text_bytes=self._open.text_bytes,
            bytes=path.stat().st_size,
            sha256=sha256(path),
            content=content.hexdigest(),
        )
        self.finished.append(FinishedShard(shard, position, self._open.empty_documents))
        journal = {"arguments": self._arguments, "finished": [asdict(entry) for entry in self.finished]}
        write_json(self.partial / JOURNAL, journal)
        self._open = _OpenShard()

    def _open_partial(self) -> list[FinishedShard]:
        """Return the intact shards of an earlier build; delete everything else in the partial folder."""
        if not self.partial.is_dir():
            return []
        for path in self.partial.glob("data-*-of-*.arrow"):  # killed while publishing
            path.replace(path.with_name(f"shard-{path.name[5:10]}.arrow"))
        finished = list(_intact(self.partial, _read_journal(self.partial, self._arguments)))
        kept = {JOURNAL, *(entry.shard.file for entry in finished)} if finished else set()
        for path in self.partial.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return finished


def _read_journal(partial: Path, arguments: Mapping[str, str | int | None]) -> list[FinishedShard]:
    """Read the finished shards of an earlier build. Raises UserError if it had other arguments."""
    try:
        found = parse_json((partial / JOURNAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    for name, value in arguments.items():
        before = found["arguments"].get(name)
        if before != value:
            raise UserError(
                f"{partial} holds an unfinished build with another {name} (found {before}, expected {value}); "
                f"use the same arguments to resume it, or delete {partial} to start over"
            )
    return [
        FinishedShard(Shard(**entry["shard"]), SourcePosition(*entry["position"]), entry["empty_documents"])
        for entry in found["finished"]
    ]


def _intact(partial: Path, finished: list[FinishedShard]) -> Iterator[FinishedShard]:
    """Yield shards until the first whose file differs from the journal."""
    for entry in finished:
        path = partial / entry.shard.file
        if not path.is_file() or path.stat().st_size != entry.shard.bytes or sha256(path) != entry.shard.sha256:
            return
        yield entry


def _write_datasets_metadata(folder: Path, manifest: Manifest) -> None:
    """Write what `datasets.load_from_disk` needs beside the shards."""
    types = {"input_ids": manifest.token_type}
    if manifest.recipe.segmenter is not None:
        types["word_starts"] = "bool"
    features = {
        column: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"} for column, dtype in types.items()
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, object] = {
        "_data_files": [{"filename": shard.file} for shard in manifest.shards],
        "_fingerprint": manifest.fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "dataset_info.json", info, indent=1)
    write_json(folder / "state.json", state, indent=1)


class MappedShard(NamedTuple):
    """A memory-mapped shard."""

    ids: TokenIds  # [tokens]
    offsets: npt.NDArray[np.int32]  # [rows + 1] where each document begins, and where the last one ends
    word_starts: npt.NDArray[np.uint8] | None  # [at least tokens / 8] one bit per token, lowest bit first


def write_shard(path: Path, ids: TokenIds, lengths: Counts, word_starts: BoolArray | None = None) -> None:
    """Write a shard as an Arrow stream of one record batch, and wait until it is on disk.

    The columns are `input_ids: list<uint16 | uint32>` and, if given, `word_starts: list<bool>` with one bit per token.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))}
    if word_starts is not None:
        columns["word_starts"] = pa.ListArray.from_arrays(offsets, pa.array(word_starts))
    batch = pa.record_batch(columns)
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_stream(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def map_shard(path: Path) -> MappedShard:
    """Memory-map a shard."""
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_stream(file).read_next_batch()
    # Arrow's own `to_numpy` imports pandas.
    column = batch.column("input_ids")
    _, offsets, _, ids = column.buffers()
    word_starts = None
    if "word_starts" in batch.schema.names:
        word_starts = np.frombuffer(batch.column("word_starts").values.buffers()[1], dtype=np.uint8)
    return MappedShard(
        np.frombuffer(ids, dtype=column.type.value_type.to_pandas_dtype(), count=len(column.values)),
        np.frombuffer(offsets, dtype=np.int32, count=len(column) + 1),
        word_starts,
    )


def row_lengths(path: Path) -> npt.NDArray[np.int32]:
    """Return the tokens of each document of a shard, [rows]."""
    return np.diff(map_shard(path).offsets)
