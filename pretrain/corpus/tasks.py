"""The tasks of a build: count the documents of a split, tokenize a split, join pieces to a shard.

Each is a function of a `BuildJob` and its own argument. It can be repeated, on any machine, and writes the same bytes
again.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from experiment.errors import UserError
from experiment.files import checksum, sha256, write_json
from experiment.process.own_process import variable_set
from experiment.storage import StorageError
from pretrain.corpus.build_plan import HELDOUT, MAIN, PART_CODES
from pretrain.corpus.documents import locate_lines, read_documents
from pretrain.corpus.formats import ReadStats, SourceDocument, UnreadableError
from pretrain.corpus.options import TextOptions
from pretrain.corpus.records import (
    ShardRecord,
    ShardTask,
    SplitCount,
    SplitRecord,
    SplitTask,
    parts_digest,
    read_record,
)
from pretrain.corpus.shards import Piece, PieceWriter, join_pieces
from pretrain.corpus.source_digest import SourceDigest
from pretrain.corpus.sources import changed_source, check_unchanged
from pretrain.corpus.splits import Split
from pretrain.corpus.task_runners import check_shared
from pretrain.corpus.tokenization import DocumentEncoder, EncodedBatch, TokenizerSpec, most_frequent

R = TypeVar("R")

BATCH_BYTES = 1 << 20  # text tokenized at once


@dataclass(frozen=True)
class BuildJob:
    """Settings that all tasks of a build share."""

    folder: Path  # of pieces, records and unfinished shards
    text_options: TextOptions
    tokenizer: TokenizerSpec
    shard_tokens: int
    batch_bytes: int


def count_split(job: BuildJob, split: Split) -> SplitCount:
    """Count and hash the documents of a split. Raises UserError for bad input."""

    def count(split: Split) -> SplitCount:
        digest, text_bytes = SourceDigest(), 0
        for _, text in _read(job, split, ReadStats()):
            digest.add(text)
            text_bytes += len(text)
        return SplitCount(split.key, digest, text_bytes)

    return _with_exact_places(count, split)


def tokenize_split(job: BuildJob, task: SplitTask) -> SplitRecord:
    """Write the pieces of a split and its record. Raises UserError for bad input, OSError if they cannot be written."""
    check_shared(job.folder)
    return _with_exact_places(lambda split: _tokenize(job, split, task.parts), task.split)


def write_shard_file(job: BuildJob, task: ShardTask) -> ShardRecord | str:
    """Join pieces to a shard, write its record, and delete the pieces. A shard that is there already is verified.

    Returns the name of a piece if it, or the shard that was made of it, is missing or damaged.
    """
    path, record_path = job.folder / task.part / task.file, job.folder / task.record
    if record := read_record(record_path, ShardRecord):
        if path.exists() and sha256(path) == record.shard.sha256:
            return record
        record_path.unlink()
    for piece in task.pieces:
        if not (job.folder / piece.file).exists() or checksum(job.folder / piece.file) != piece.checksum:
            return piece.file
    shard, lengths = join_pieces(job.folder, task.pieces, path)
    record = ShardRecord(task.part, shard, [piece.file for piece in task.pieces], sorted(lengths.items()))
    write_json(record_path, asdict(record), durable=False)
    for piece in task.pieces:
        (job.folder / piece.file).unlink(missing_ok=True)
    return record


def _with_exact_places(read: Callable[[Split], R], split: Split) -> R:
    """Call `read(split)`; if it raises UserError, again with the lines before the split counted, for its message."""
    with variable_set("TOKENIZERS_PARALLELISM", "false"):  # there is a process for each core
        try:
            return read(split)
        except (StorageError, UnreadableError):  # no line is the cause, and counting may take hours
            raise
        except UserError:
            located = replace(split, spans=tuple(map(locate_lines, split.spans)))
            if located == split:
                raise
            return read(located)


@lru_cache(maxsize=2)
def _encoder(spec: TokenizerSpec) -> DocumentEncoder:
    return DocumentEncoder(spec)


def _read(job: BuildJob, split: Split, stats: ReadStats) -> Iterator[tuple[SourceDocument, bytes]]:
    """Yield all documents that have a token, and their UTF-8 text. Raises UserError for bad input."""
    plain = _encoder(replace(job.tokenizer, segmenter=None))
    for document in read_documents(split.spans, job.text_options, stats):
        text = document.utf8()
        # Control characters may give no token. Sampling must count the documents that will be in the corpus.
        has_token = job.tokenizer.letters_give_tokens and any(map(str.isalnum, document.text))
        if has_token or _encode(plain, [document]).lengths[0]:
            yield document, text
        else:
            stats.empty_documents += 1
    for source, _ in split.spans:
        check_unchanged(source)


def _encode(encoder: DocumentEncoder, documents: Sequence[SourceDocument]) -> EncodedBatch:
    """Encode documents. Raises UserError if the tokenizer fails."""
    try:
        return encoder.encode([document.text for document in documents])
    except Exception as error:  # tokenizers raises bare Exception
        first, last = documents[0].place, documents[-1].place
        where = first if len(documents) == 1 else f"a document between {first} and {last}"
        raise UserError(f"the tokenizer fails on {where}: {error}") from None


def _tokenize(job: BuildJob, split: Split, parts: bytes) -> SplitRecord:
    stats, digest, text_bytes = ReadStats(), SourceDigest(), 0
    sample = parts_digest(parts)
    batches = {part: _Batch(job, f"{split.key}-{sample}-{part}") for part in (MAIN, HELDOUT)}
    for document, text in _read(job, split, stats):
        if parts and digest.documents == len(parts):
            raise changed_source(split.spans[0].source.name)
        part = PART_CODES[parts[digest.documents]] if parts else MAIN
        digest.add(text)
        text_bytes += len(text)
        if part is not None:
            batches[part].add(document, len(text))
    if digest.documents < len(parts):
        raise changed_source(split.spans[0].source.name)
    pieces = {part: batch.finish() for part, batch in batches.items()}
    empty = stats.empty_documents + batches[MAIN].writer.empty_documents
    unknown = most_frequent(batches[MAIN].unknown_texts)
    record = SplitRecord(
        split.key, sample, digest, text_bytes, empty, stats.start_matches, stats.archives, pieces, unknown
    )
    write_json(job.folder / f"{split.key}.json", asdict(record), durable=False)
    return record


class _Batch:
    """Documents for one part, collected until there are enough to tokenize them together."""

    def __init__(self, job: BuildJob, name: str) -> None:
        self.writer = PieceWriter(job.folder, name, job.shard_tokens)
        self.unknown_texts = Counter[str]()
        self._job = job
        self._documents: list[SourceDocument] = []
        self._text_bytes: list[int] = []
        self._total = 0

    def add(self, document: SourceDocument, text_bytes: int) -> None:
        self._documents.append(document)
        self._text_bytes.append(text_bytes)
        self._total += text_bytes
        if self._total >= self._job.batch_bytes:
            self._encode()

    def finish(self) -> list[Piece]:
        if self._documents:
            self._encode()
        return self.writer.finish()

    def _encode(self) -> None:
        documents, encoder = self._documents, _encoder(self._job.tokenizer)
        encoded = _encode(encoder, documents)
        if encoded.special is not None:
            raise UserError(
                f"{documents[encoded.special].place}: the tokenizer turns this text into one of its special tokens; "
                "a corpus cannot be built with such a tokenizer"
            )
        self.writer.add(encoded, np.array(self._text_bytes))
        self.unknown_texts += encoder.unknown_texts([document.text for document in documents], encoded)
        self._documents, self._text_bytes, self._total = [], [], 0
