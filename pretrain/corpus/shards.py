"""Write encoded documents as Arrow files: the pieces of a split, and shards, which are joined pieces.

A piece or shard is closed after the document that fills it. It holds one record batch, so its token ids are contiguous
and can be memory-mapped. Its size bounds the memory of a task.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from experiment.files import atomic_write, checksum, fsync, sha256, write_json
from pretrain.corpus.manifest import Manifest, Shard
from pretrain.corpus.tokenization import Counts, EncodedBatch, TokenIds
from pretrain.corpus.word_boundaries import BoolArray

DATASETS_METADATA = ("dataset_info.json", "state.json")
SHARD_TOKENS = 32 * 2**20  # close a piece or a shard at the first document that reaches this


@dataclass(frozen=True)
class Piece:
    """An Arrow file with documents of one split, before it becomes a part of a shard."""

    file: str
    rows: int  # documents
    tokens: int
    unknown_tokens: int
    words: int
    text_bytes: int
    checksum: str  # XXH3-128 of the file
    unspaced: int = 0  # characters, see `EncodedBatch`


class PieceWriter:
    """Writes the documents of a split for one corpus."""

    def __init__(self, folder: Path, name: str, piece_tokens: int) -> None:
        """`name`: the files are called name-000.arrow and so on."""
        self.pieces: list[Piece] = []
        self.empty_documents = 0  # without a token
        self._folder, self._name, self._piece_tokens = folder, name, piece_tokens
        self._open()

    def _open(self) -> None:
        """Begin a piece."""
        self._ids: list[TokenIds] = []
        self._lengths: list[Counts] = []
        self._word_starts: list[BoolArray] = []
        self._counts = Counter[str]()  # fields of `Piece`

    def add(self, batch: EncodedBatch, text_bytes: Counts) -> None:
        """Append D documents. `text_bytes` [D]: UTF-8 bytes of each."""
        first, token = 0, 0
        ends = np.cumsum(batch.lengths)
        while first < len(ends):
            # The document that fills the piece is the last one in it.
            room = self._piece_tokens - self._counts["tokens"]
            last = min(int(np.searchsorted(ends, token + room)), len(ends) - 1)
            documents, end = slice(first, last + 1), int(ends[last])
            self._append(batch, documents, slice(token, end))
            self._counts["text_bytes"] += int(text_bytes[documents].sum())
            first, token = last + 1, end
            if self._counts["tokens"] >= self._piece_tokens:
                self._close()

    def finish(self) -> list[Piece]:
        """Close the last piece, and return all."""
        if self._counts["tokens"]:
            self._close()
        return self.pieces

    def _append(self, batch: EncodedBatch, documents: slice, tokens: slice) -> None:
        lengths = batch.lengths[documents]
        kept = lengths[lengths > 0]
        self.empty_documents += len(lengths) - len(kept)
        self._ids.append(batch.ids[tokens])
        self._lengths.append(kept)
        if batch.word_starts is not None:
            self._word_starts.append(batch.word_starts[tokens])
        self._counts.update(
            rows=len(kept),
            tokens=int(kept.sum()),
            unknown_tokens=int(batch.unknown[documents].sum()),
            words=int(batch.words[documents].sum()),
            unspaced=int(batch.unspaced[documents].sum()),
        )

    def _close(self) -> None:
        path = self._folder / f"{self._name}-{len(self.pieces):03d}.arrow"
        word_starts = np.concatenate(self._word_starts) if self._word_starts else None
        # A piece that is damaged by a power cut differs from its checksum, and is written again.
        write_shard(path, np.concatenate(self._ids), np.concatenate(self._lengths), word_starts, durable=False)
        self.pieces.append(Piece(path.name, **self._counts, checksum=checksum(path)))
        self._open()


def compose_shards(pieces: Iterable[Piece], shard_tokens: int) -> list[tuple[Piece, ...]]:
    """Group pieces that follow one another, as many as fit in a shard."""
    groups, tokens = list[list[Piece]](), 0
    for piece in pieces:
        if not groups or tokens + piece.tokens > shard_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(piece)
        tokens += piece.tokens
    return [tuple(group) for group in groups]


def join_pieces(folder: Path, pieces: Sequence[Piece], path: Path) -> tuple[Shard, Counter[int]]:
    """Write pieces of `folder` as the shard `path`, and return its description and the documents of each length."""
    if len(pieces) == 1:
        path.parent.mkdir(exist_ok=True)
        fsync(folder / pieces[0].file)
        (folder / pieces[0].file).replace(path)
    else:
        mapped = [map_shard(folder / piece.file) for piece in pieces]
        has_words = mapped[0].word_starts is not None
        write_shard(
            path,
            np.concatenate([piece.ids for piece in mapped]),
            np.concatenate([np.diff(piece.offsets) for piece in mapped]),
            np.concatenate([piece.word_flags(0, len(piece.ids)) for piece in mapped]) if has_words else None,
        )
    shard = map_shard(path)
    lengths = np.diff(shard.offsets).astype(np.int64)
    content = hashlib.sha256(lengths.data)
    content.update(shard.ids.data)
    if shard.word_starts is not None:
        content.update(np.packbits(shard.word_flags(0, len(shard.ids))).data)
    described = Shard(
        file=path.name,
        rows=len(lengths),
        tokens=len(shard.ids),
        unknown_tokens=sum(piece.unknown_tokens for piece in pieces),
        words=sum(piece.words for piece in pieces),
        text_bytes=sum(piece.text_bytes for piece in pieces),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        content=content.hexdigest(),
    )
    return described, Counter(lengths.tolist())


def write_datasets_metadata(folder: Path, manifest: Manifest) -> None:
    """Write the metadata that `datasets.load_from_disk` needs beside the shards."""
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
    for name, content in zip(DATASETS_METADATA, (info, state), strict=True):
        write_json(folder / name, content, indent=1)


class MappedShard(NamedTuple):
    """A memory-mapped shard."""

    ids: TokenIds  # [tokens]
    offsets: NDArray[np.int32]  # [rows + 1] where each document begins, and where the last one ends
    word_starts: NDArray[np.uint8] | None  # [at least tokens / 8] one bit per token, lowest bit first

    def word_flags(self, begin: int, end: int) -> BoolArray:
        """Return whether each of the tokens [begin, end) begins a word."""
        assert self.word_starts is not None
        bits = np.unpackbits(self.word_starts[begin // 8 : -(-end // 8)], bitorder="little")
        return bits[begin % 8 :][: end - begin].astype(np.bool_)


def write_shard(
    path: Path, ids: TokenIds, lengths: Counts, word_starts: BoolArray | None, durable: bool = True
) -> None:
    """Write a shard as an Arrow stream of one record batch; with `durable`, wait until it is on disk.

    The columns are `input_ids: list<uint16 | uint32>` and, if given, `word_starts: list<bool>` with one bit per token.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))}
    if word_starts is not None:
        columns["word_starts"] = pa.ListArray.from_arrays(offsets, pa.array(word_starts))
    batch = pa.record_batch(columns)
    with (
        atomic_write(path, durable) as temporary,
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
    tokens = np.frombuffer(ids, dtype=column.type.value_type.to_pandas_dtype(), count=len(column.values))
    return MappedShard(tokens, np.frombuffer(offsets, dtype=np.int32, count=len(column) + 1), word_starts)
