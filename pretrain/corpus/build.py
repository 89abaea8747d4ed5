"""`deepcloze corpus`: raw text -> a corpus folder of Arrow shards.

1. One process reads the documents in order, and hashes them on the way.
2. Batches of them go to worker processes, which turn text into token ids; results are taken in the order of the source.
3. A writer cuts the stream of documents into shards in `DIR.partial/`; each finished one is entered in a journal.
4. When all is written, synced and checked, the folder is renamed to `DIR`.

A killed build reads the text again, without tokenizing what the journal has. The bytes of a corpus depend on the
documents, the tokenizer and the draws, never on workers, time, paths or interruptions.
"""

import errno
import itertools
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from experiment.errors import UserError
from experiment.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, vocabulary_size
from pretrain.corpus import encoding
from pretrain.corpus.encoding import Encoded, Encoder, Vocabulary
from pretrain.corpus.formats import Document, Reading
from pretrain.corpus.manifest import MANIFEST, TOKENIZER, Manifest, Recipe, read_manifest
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.progress_bar import Progress
from pretrain.corpus.shards import Position, ShardWriter
from pretrain.corpus.sources import Source, find_sources, read_documents
from pretrain.corpus.tokenizer import vocabulary_of
from pretrain.corpus.words import segmenter_identity, word_boundaries
from pretrain.corpus.workers import worker_pool

_BATCH_BYTES = 1 << 20  # of text that a worker is given at once
_BATCHES_PER_WORKER = 3  # in flight: bounds memory, and keeps a worker busy while its last result is written
MAIN, HELDOUT = PARTS = ("main", "heldout")


def build_corpus(options: CorpusOptions) -> Manifest:
    """Build the corpus `options.output` (and, with `holdout`, `output`-heldout) and return its manifest.

    If the corpus exists already, made from the same documents with the same tokenizer, it is left as it is. Finished
    shards survive any ending; the same call resumes after them. Raises UserError for bad input (naming file and line),
    an output folder that holds something else, and a full disk; StoppedError if a worker process died.
    """
    draws = Draws(options.seed, options.limit, options.holdout)
    sources = find_sources(options.source)
    segmenter = options.segmenter
    opened = load_tokenizer(options.tokenizer)
    vocabulary = replace(vocabulary_of(opened), segmenter=segmenter)
    if segmenter is not None and word_boundaries(vocabulary.tokenizer_json) is None:
        raise UserError(
            f"--segmenter {segmenter}: the tokenizer {options.tokenizer} marks words in a way that is not known"
        )
    plan = _Plan(
        folder=options.output.absolute(),
        sources=sources,
        text_format=options,
        draws=draws,
        tokenizer=tokenizer_fingerprint(opened),
        segmenter=None if segmenter is None else segmenter_identity(segmenter),
        encoder=Encoder(replace(vocabulary, segmenter=None)),
    )
    with _explaining_disk_errors(plan.folder), _alone(plan.folder):
        if _is_used(plan.folder):
            return _confirm(plan)
        total = _read_through("counting", plan) if draws.any else None
        writers = _open_writers(plan, vocabulary.token_type, total)
        try:
            end, empty = _encode(plan, writers, total, vocabulary, options.workers or len(os.sched_getaffinity(0)))
            manifests = {}
            for part, writer in writers.items():
                save_tokenizer(opened, writer.partial / TOKENIZER)
                manifests[part] = writer.finish(
                    plan.recipe(part, end), vocabulary_size(opened), empty if part == MAIN else 0, end
                )
        finally:
            for writer in writers.values():
                writer.discard_if_useless()
        # The main corpus comes last: where it is, all is done.
        for part in sorted(writers, key=PARTS.index, reverse=True):
            writers[part].publish(manifests[part])
    for part, manifest in manifests.items():
        print(summary(plan.folder_of(part), manifest))
    return manifests[MAIN]


def summary(folder: Path, manifest: Manifest) -> str:
    """What a corpus is, in a few lines."""
    lengths = ", ".join(f"{percentile} %: {length:,}" for percentile, length in manifest.length_percentiles.items())
    return (
        f"{folder}\n"
        f"  {manifest.documents:,} documents ({manifest.empty_documents:,} empty ones dropped), "
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards\n"
        f"  {manifest.unknown_token_rate:.3%} unknown tokens, {manifest.tokens_per_word:.2f} tokens per word\n"
        f"  document lengths in tokens: {lengths}"
    )


@dataclass(frozen=True)
class Draws:
    """Documents drawn by seed: `holdout` of all for the held-out corpus, `limit` of the rest for the main one."""

    seed: int
    limit: int | None
    holdout: int | None

    @property
    def any(self) -> bool:
        return self.limit is not None or self.holdout is not None

    def parts(self, documents: int) -> Iterator[str | None]:
        """For each of `documents` in turn, the part it goes to; None: neither. Raises UserError if there are too few.

        Selection sampling (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S): exact counts, constant
        memory, in the order of the source. What is held out does not depend on the limit.
        """
        holdout = self.holdout or 0
        if holdout >= documents:
            raise UserError(f"--holdout {holdout}: the source has only {documents} documents with text")
        rest = documents - holdout
        limit = rest if self.limit is None else min(self.limit, rest)
        return self._select(documents, holdout, rest, limit)

    def _select(self, documents: int, holdout: int, rest: int, limit: int) -> Iterator[str | None]:
        for_holdout, for_limit = random.Random(f"holdout {self.seed}"), random.Random(f"limit {self.seed}")
        for left in range(documents, 0, -1):
            if for_holdout.random() * left < holdout:
                holdout -= 1
                yield HELDOUT
            elif for_limit.random() * rest < limit:
                rest, limit = rest - 1, limit - 1
                yield MAIN
            else:
                rest -= 1
                yield None


@dataclass(frozen=True)
class _Plan:
    """What is to be built."""

    folder: Path
    sources: tuple[Source, ...]
    text_format: TextOptions
    draws: Draws
    tokenizer: str  # fingerprint
    segmenter: str | None  # identity
    encoder: Encoder  # for the few texts that may have no token

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS if self.draws.holdout else (MAIN,)

    def folder_of(self, part: str) -> Path:
        return self.folder if part == MAIN else self.folder.with_name(f"{self.folder.name}-{HELDOUT}")

    def recipe(self, part: str, end: Position) -> Recipe:
        """`end`: the position behind the last document of the source."""
        seed = self.draws.seed if self.draws.any else None
        return Recipe(
            end.digest, self.tokenizer, part, seed, self.draws.limit, self.draws.holdout, segmenter=self.segmenter
        )


class _Item(NamedTuple):
    document: Document
    bytes: int  # UTF-8
    position: Position  # behind this document


def _stream(plan: _Plan, reading: Reading, progress: Progress) -> Iterator[_Item]:
    """All documents with tokens, each with the digest of everything up to it. Raises UserError on bad input or none."""
    digest, count = "", 0
    for document in read_documents(plan.sources, plan.text_format, reading):
        try:
            text = document.text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{document.place}: half of a surrogate pair, which is no text") from None
        # Control characters alone give no token; a letter or a digit always does. Draws must count what will be there.
        if not any(map(str.isalnum, document.text)) and not plan.encoder.encode([document.text]).lengths[0]:
            reading.empty += 1
            continue
        count += 1
        digest = xxhash.xxh3_128_hexdigest(digest.encode() + text)
        progress.advance(reading, len(text))
        yield _Item(document, len(text), Position(count, digest))
    if not digest:
        named = ", ".join(source.name for source in plan.sources)
        raise UserError(f"--source {named}: no document in it gives a token")


def _read_through(label: str, plan: _Plan) -> Position:
    """Read everything, to know how many documents there are and what they are."""
    with Progress(label, plan.sources) as progress:
        (last,) = deque(_stream(plan, Reading(), progress), maxlen=1)
    return last.position


def _is_used(folder: Path) -> bool:
    """True for a corpus, False for nothing at all. Raises UserError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--output {folder} already holds something that is no corpus; name a new folder")
    return True


def _confirm(plan: _Plan) -> Manifest:
    """The manifest of the finished corpus, if it is the one that would be built. Raises UserError if it is another."""
    manifests = {part: read_manifest(plan.folder_of(part)) for part in plan.parts}
    _refuse_other(plan, manifests, None)
    _refuse_other(plan, manifests, _read_through("comparing", plan))
    print(f"{plan.folder} is there already, made of the same documents by the same tokenizer")
    for part, manifest in manifests.items():
        print(summary(plan.folder_of(part), manifest))
    return manifests[MAIN]


def _refuse_other(plan: _Plan, manifests: dict[str, Manifest], end: Position | None) -> None:
    """Raises UserError for a corpus with another recipe; while the source is not read, `end` is None."""
    for part, manifest in manifests.items():
        found = manifest.recipe
        expected = plan.recipe(part, end or Position(0, found.source))
        for name in ("tokenizer", "segmenter", "part", "limit", "holdout", "seed", "source"):
            if getattr(found, name) != getattr(expected, name):
                what = "other documents" if name == "source" else f"another {name}: {getattr(found, name)}"
                raise UserError(
                    f"--output: {plan.folder_of(part)} already holds another corpus ({what}); "
                    "name a new folder or delete it"
                )


def _open_writers(plan: _Plan, token_type: str, total: Position | None) -> dict[str, ShardWriter]:
    """A writer for each part that is not finished."""
    arguments = {
        "tokenizer": plan.tokenizer,
        "segmenter": plan.segmenter,
        "limit": plan.draws.limit,
        "holdout": plan.draws.holdout,
        "seed": plan.draws.seed if plan.draws.any else None,
        "source": total.digest if total else None,  # the draws depend on how many documents there are
    }
    writers = {}
    for part in plan.parts:
        folder = plan.folder_of(part)
        if part == HELDOUT and _is_used(folder):  # an earlier build died after it had published this part
            _refuse_other(plan, {part: read_manifest(folder)}, total)
        else:
            writers[part] = ShardWriter(folder, token_type, arguments)
    return writers


@dataclass
class _Batch:
    """Documents for one part, until they are enough for a worker."""

    documents: list[Document] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    bytes: int = 0

    def add(self, item: _Item) -> None:
        self.documents.append(item.document)
        self.text_bytes.append(item.bytes)
        self.positions.append(item.position)
        self.bytes += item.bytes


def _encode(
    plan: _Plan, writers: dict[str, ShardWriter], total: Position | None, vocabulary: Vocabulary, workers: int
) -> tuple[Position, int]:
    """Read, encode and write everything that no finished shard has; (position of the end, empty documents)."""
    reading = Reading()
    parts = plan.draws.parts(total.documents) if total else itertools.repeat(MAIN)
    batches = {part: _Batch() for part in writers}
    in_flight: deque[tuple[ShardWriter, _Batch, Future[Encoded]]] = deque()
    end = Position(0, "")
    with (
        Progress("tokenizing", plan.sources) as progress,
        worker_pool(workers, encoding.start_worker, vocabulary) as pool,
    ):
        for item, part in zip(_stream(plan, reading, progress), parts, strict=False):
            end = item.position
            _refuse_changed_source(writers, end)
            if part not in writers or end.documents <= writers[part].resumed_at.documents:
                continue
            batches[part].add(item)
            if batches[part].bytes >= _BATCH_BYTES:
                in_flight.append(_send(pool, writers[part], batches[part]))
                batches[part] = _Batch()
                if len(in_flight) >= _BATCHES_PER_WORKER * workers:
                    _write(*in_flight.popleft())
        in_flight.extend(_send(pool, writers[part], batch) for part, batch in batches.items() if batch.documents)
        while in_flight:
            _write(*in_flight.popleft())
    if total is not None and end != total:
        raise UserError("the source changed while it was read; start again")
    for writer in writers.values():
        if writer.resumed_at.documents > end.documents:
            raise _changed_source(writer)
    return end, reading.empty


def _refuse_changed_source(writers: dict[str, ShardWriter], position: Position) -> None:
    for writer in writers.values():
        if position.documents == writer.resumed_at.documents and position.digest != writer.resumed_at.digest:
            raise _changed_source(writer)


def _changed_source(writer: ShardWriter) -> UserError:
    return UserError(
        f"{writer.partial} holds an unfinished build of other documents (the source changed, or how it is read); "
        "build from the same documents to go on with it, or delete it to start over"
    )


def _send(pool: ProcessPoolExecutor, writer: ShardWriter, batch: _Batch) -> tuple[ShardWriter, _Batch, Future[Encoded]]:
    texts = [document.text for document in batch.documents]
    return writer, batch, pool.submit(encoding.encode_in_worker, texts)


def _write(writer: ShardWriter, batch: _Batch, future: Future[Encoded]) -> None:
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
            "text must never do that, so this tokenizer cannot make a corpus of it"
        )
    writer.add(encoded, np.array(batch.text_bytes, dtype=np.int64), batch.positions)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time into `folder`. Raises UserError where another one runs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--output {folder}: another build is writing it") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opens it later finds another file, and a finished corpus
        lock.release()


@contextmanager
def _explaining_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--output {folder}: the disk is full ({error.strerror}); make room and give the same command again, "
                "which goes on with the shards that are finished"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UserError(f"--output {folder}: cannot write there: {error.strerror}") from None
        raise
