"""Read documents, encode them in worker processes and hand them to the shard writers, in the order of the source."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from experiment.errors import UserError
from pretrain.corpus.build_plan import MAIN, BuildPlan, Part
from pretrain.corpus.documents import read_documents, reading_progress
from pretrain.corpus.formats import Document, ReadStats
from pretrain.corpus.shards import ShardWriter, SourcePosition
from pretrain.corpus.tokenization import EncodedBatch, encode_in_worker, start_worker
from pretrain.corpus.workers import worker_pool

_BATCH_BYTES = 1 << 20  # text sent to a worker at once
_BATCHES_PER_WORKER = 3  # in flight; bounds memory, and keeps workers busy while a result is being written
_KILLED = "use fewer --workers, and run the same command again to resume from the finished shards"


class PositionedDocument(NamedTuple):
    """A document and the source position after it."""

    document: Document
    text_bytes: int  # UTF-8
    position: SourcePosition


def read_source(
    plan: BuildPlan, stats: ReadStats, advance: Callable[[ReadStats, int], None]
) -> Iterator[PositionedDocument]:
    """Yield all documents that have a token, and call `advance` for each, see `reading_progress`.

    Raises UserError for bad input, and if there is no such document.
    """
    digest, count = "", 0
    for document in read_documents(plan.sources, plan.text_options, stats):
        try:
            text = document.text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{document.place}: expected Unicode text, found half of a surrogate pair") from None
        # Letters and digits always give a token, control characters may not. Sampling must count the documents that
        # will be in the corpus.
        if not any(map(str.isalnum, document.text)) and not plan.encoder.encode([document.text]).lengths[0]:
            stats.empty_documents += 1
            continue
        count += 1
        digest = xxhash.xxh3_128_hexdigest(digest.encode() + text)
        advance(stats, len(text))
        yield PositionedDocument(document, len(text), SourcePosition(count, digest))
    if not digest:
        names = ", ".join(source.name for source in plan.sources)
        raise UserError(f"--source {names}: none of its documents gives a token")


def scan_source(label: str, plan: BuildPlan) -> SourcePosition:
    """Read the whole source without encoding it, and return its end: the number of documents and their digest."""
    with reading_progress(label, plan.sources) as advance:
        (last,) = deque(read_source(plan, ReadStats(), advance), maxlen=1)
    return last.position


def encode_source(
    plan: BuildPlan, writers: dict[Part, ShardWriter], total: SourcePosition | None
) -> tuple[SourcePosition, int]:
    """Encode and write all documents that are not yet in a finished shard.

    Returns the end of the source and the number of empty documents. Raises UserError if the source differs from the
    one that `total` was counted on, or from the one that the finished shards were built from.

    Args:
        writers: one for each part that is not finished.
        total: the end of the source, as `scan_source` returns it; needed if documents are sampled.
    """
    stats, end = ReadStats(), SourcePosition(0, "")
    parts = plan.sampling.assign(total.documents) if total else itertools.repeat(MAIN)
    batches = {part: _Batch() for part in writers}
    with (
        reading_progress("tokenizing", plan.sources) as advance,
        worker_pool(plan.workers, _KILLED, start_worker, plan.tokenizer.spec) as pool,
    ):
        queue = _EncodeQueue(pool, capacity=_BATCHES_PER_WORKER * plan.workers)
        for document, part in zip(read_source(plan, stats, advance), parts, strict=False):
            end = document.position
            _check_resumed_source(writers, end)
            if part not in writers or end.documents <= writers[part].resumed_at.documents:
                continue
            batches[part].add(document)
            if batches[part].bytes >= _BATCH_BYTES:
                queue.submit(writers[part], batches[part])
                batches[part] = _Batch()
        for part, batch in batches.items():
            if batch.documents:
                queue.submit(writers[part], batch)
        queue.drain()
    if total is not None and end != total:
        raise UserError("the source changed while it was read; run the command again")
    for writer in writers.values():
        if writer.resumed_at.documents > end.documents:
            raise _changed_source(writer)
    return end, stats.empty_documents


@dataclass
class _Batch:
    """Documents for one part, collected until there are enough for a worker."""

    documents: list[Document] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    positions: list[SourcePosition] = field(default_factory=list)
    bytes: int = 0

    def add(self, item: PositionedDocument) -> None:
        self.documents.append(item.document)
        self.text_bytes.append(item.text_bytes)
        self.positions.append(item.position)
        self.bytes += item.text_bytes


class _EncodeQueue:
    """Batches that are being encoded. Results are written in the order in which the batches were submitted."""

    def __init__(self, pool: ProcessPoolExecutor, capacity: int) -> None:
        self._pool = pool
        self._capacity = capacity
        self._in_flight: deque[tuple[ShardWriter, _Batch, Future[EncodedBatch]]] = deque()

    def submit(self, writer: ShardWriter, batch: _Batch) -> None:
        """Send a batch to a worker. If the queue is full, wait for the oldest one and write it."""
        texts = [document.text for document in batch.documents]
        self._in_flight.append((writer, batch, self._pool.submit(encode_in_worker, texts)))
        if len(self._in_flight) >= self._capacity:
            _write(*self._in_flight.popleft())

    def drain(self) -> None:
        """Wait for all batches and write them."""
        while self._in_flight:
            _write(*self._in_flight.popleft())


def _write(writer: ShardWriter, batch: _Batch, future: Future[EncodedBatch]) -> None:
    try:
        encoded = future.result()
    except (BrokenProcessPool, KeyboardInterrupt):
        raise
    except Exception as error:  # tokenizers raises bare Exception
        first, last = batch.documents[0].place, batch.documents[-1].place
        raise UserError(f"the tokenizer fails on a document between {first} and {last}: {error}") from None
    if encoded.special is not None:
        raise UserError(
            f"{batch.documents[encoded.special].place}: the tokenizer turns this text into one of its special tokens; "
            "a corpus cannot be built with such a tokenizer"
        )
    writer.add(encoded, np.array(batch.text_bytes, dtype=np.int64), batch.positions)


def _check_resumed_source(writers: dict[Part, ShardWriter], position: SourcePosition) -> None:
    for writer in writers.values():
        if position.documents == writer.resumed_at.documents and position.digest != writer.resumed_at.digest:
            raise _changed_source(writer)


def _changed_source(writer: ShardWriter) -> UserError:
    return UserError(
        f"{writer.partial} holds an unfinished build of other documents (the source or the way it is read changed); "
        "use the same documents to resume it, or delete it to start over"
    )
