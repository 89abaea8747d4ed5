"""Cost of data loading, without a model.

    python -m benchmarks.loader [--length 512] [--documents web]

On a corpus of random tokens in documents of realistic lengths, and on a mixture of three such corpora with sequences of
up to 8,192 tokens:

- the milliseconds of each phase of a batch, at the beginning of the stream and at step 10^9, for one rank and for one
  of 1,024. Every rank repeats the phases from order to assignment for the whole global batch. Reading and masking
  are parts of the rank's own share.
- the tokens per second of one worker, and the share of the time that a rank waits for it at a simulated consumption.
"""

import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import describe_machine
from experiment.formatting import print_table
from experiment.process.hardware import keep_freed_memory
from pretrain.batching.batch import flatten_batch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.loader import BatchLoader
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSequences, BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout, RowKind
from pretrain.batching.sequences import open_index
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig
from pretrain.corpus.manifest import Manifest, Recipe, write_manifest
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.corpus.shards import SHARD_TOKENS, PieceWriter, join_pieces
from pretrain.corpus.tokenization import EncodedBatch
from pretrain.world import World

_VOCABULARY = 30_000
_DOCUMENTS = {
    "wiki": (4.4, 1.0),
    "web": (6.0, 1.1),
    "books": (11.0, 0.5),
}  # mean and deviation of the log of the length
_MIXTURE = {"wiki": 0.3, "web": 0.5, "books": 0.2}  # shares of the sequences
_LONGEST = 8192  # tokens of the longest sequence of the mixture
_PHASES = ("order", "order to assignment", "read", "mask", "own share", "send, receive")


def loader(
    *,
    documents: str = "web",
    length: int = 512,
    tokens: int = 50_000_000,
    microbatch_tokens: int = 32_768,
    consumption: int = 300_000,
    seconds: float = 10.0,
) -> None:
    """Measure and print two tables.

    Args:
        documents: how long documents are: wiki (paragraphs), web or books
        length: longest sequence, in tokens
        tokens: of each corpus
        microbatch_tokens: slots of a microbatch
        consumption: tokens per second that the simulated rank trains on
        seconds: for which one worker is measured
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a run
    with tempfile.TemporaryDirectory() as scratch:
        corpora = {name: _make_corpus(Path(scratch) / name, _document_lengths(name, tokens)) for name in _DOCUMENTS}
        phases, rates = list[list[str]](), list[list[str]]()
        for name, maker in _cases(corpora, documents, length, microbatch_tokens):
            for step in (0, 10**9):
                figures = _median_phases(maker, step)
                phases.append([f"{name}, step {step:.0e}", *(f"{figures[phase]:.2f}" for phase in _PHASES)])
            rates.append([name, f"{_rate(maker, seconds):,.0f}", f"{_wait(maker, consumption, seconds):.2%}"])
    title = f"milliseconds per batch, {documents}, sequences of up to {length}"
    print_table(["batch", *_PHASES], phases, title=title)
    print_table(["batch", "tokens/s of one worker", f"wait at {consumption:,} tokens/s"], rates)
    print(
        f"peak memory of the rank and of a worker: {_peak(resource.RUSAGE_SELF)}, "
        f"{_peak(resource.RUSAGE_CHILDREN)} MiB, memory-mapped files included"
    )
    print(describe_machine())


def _cases(
    corpora: Mapping[str, Corpus], documents: str, length: int, microbatch_tokens: int
) -> Iterator[tuple[str, BatchMaker]]:
    kind: RowKind
    for kind in ("packed", "flat"):
        layout = MicrobatchLayout(length, max(length, microbatch_tokens), kind)
        for world_size, sequences in ((1, 256), (1, 4096), (1024, 65536)):
            world = World(world_size // 2, world_size)
            name = f"{kind}, {sequences:,} sequences, {world_size:,} ranks"
            yield name, _make_maker([corpora[documents]], (1.0,), layout, sequences, world)
        mixture = [corpora[part] for part in _MIXTURE]
        layout = replace(layout, max_seq_length=_LONGEST, microbatch_tokens=max(_LONGEST, microbatch_tokens))
        yield f"{name}, mixture", _make_maker(mixture, tuple(_MIXTURE.values()), layout, sequences, world)


def _document_lengths(documents: str, tokens: int) -> NDArray[np.int64]:
    """Lognormal lengths that add up to about `tokens`."""
    mean, deviation = _DOCUMENTS[documents]
    count = int(tokens / np.exp(mean + deviation**2 / 2))
    drawn = np.random.default_rng(0).lognormal(mean, deviation, count)
    return np.clip(drawn, 1, 300_000).astype(np.int64)


def _make_corpus(folder: Path, lengths: NDArray[np.int64]) -> Corpus:
    """Write documents of random tokens."""
    writer, nothing = PieceWriter(folder, "piece", SHARD_TOKENS), np.zeros_like(lengths)
    ids = np.random.default_rng(1).integers(5, _VOCABULARY, lengths.sum(), dtype=np.uint16)
    writer.add(EncodedBatch(ids, lengths, nothing, nothing, nothing, None, None), nothing)
    pieces = writer.finish()
    shards = [
        join_pieces(folder, [piece], folder / f"data-{index:05d}-of-{len(pieces):05d}.arrow")[0]
        for index, piece in enumerate(pieces)
    ]
    recipe = Recipe("random", "random", "main", None, None, None)
    write_manifest(folder, Manifest(recipe, _VOCABULARY, "uint16", 0, {}, tuple(shards)))
    return open_corpus(folder)


def _make_maker(
    corpora: Sequence[Corpus], shares: tuple[float, ...], layout: MicrobatchLayout, sequences: int, world: World
) -> BatchMaker:
    vocabulary = Vocabulary(
        prefix=(2,),
        suffix=(3,),
        pad_id=0,
        mask_id=4,
        unmaskable=np.arange(_VOCABULARY) < 5,
        replacements=np.arange(5, _VOCABULARY),
    )
    sources = tuple(
        MaskedCorpus(
            corpus,
            open_index(corpus, layout.max_seq_length - vocabulary.num_special_tokens, corpus.path),
            Masker(vocabulary, MaskingConfig(), seed=1, corpus=corpus.fingerprint),
        )
        for corpus in corpora
    )
    streams = tuple(CorpusStream(len(source.index), seed) for seed, source in enumerate(sources, start=1))
    order = ShuffledOrder(streams, BatchSizes(sequences), shares=shares)
    return BatchMaker(sources, order, vocabulary, layout, world)


def _median_phases(maker: BatchMaker, step: int) -> dict[str, float]:
    """Median milliseconds of each phase of the batches from `step` on."""
    maker[step]  # maps the corpus's files
    measured = [_phases(maker, number) for number in range(step, step + 9)]
    return {phase: statistics.median(figures[phase] for figures in measured) for phase in measured[0]}


def _phases(maker: BatchMaker, step: int) -> dict[str, float]:
    order, _ = _timed(lambda: maker.order.batch(step))
    every_rank, assigned = _timed(lambda: maker.assign(step))
    share, batch = _timed(lambda: maker.make_share(step, *assigned))
    parts = [_read_and_mask(source, number, batch.origins) for number, source in enumerate(maker.corpora)]
    read, mask = map(sum, zip(*parts, strict=True))
    send, _ = _timed(lambda: pickle.loads(pickle.dumps(flatten_batch(batch), protocol=pickle.HIGHEST_PROTOCOL)))
    return dict(zip(_PHASES, (order, every_rank, read, mask, share, send), strict=True))


def _read_and_mask(source: MaskedCorpus, number: int, origins: BatchSequences) -> tuple[float, float]:
    """Return the milliseconds to read and to mask the sequences of corpus `number`."""
    own = origins.select(origins.corpora == number)
    starts, lengths = np.asarray(source.index.starts[own.ids]), source.index.lengths(own.ids)
    read, ids = _timed(lambda: source.corpus.read(starts, lengths))
    mask, _ = _timed(lambda: source.masker.mask(ids.astype(np.int64), lengths, own))
    return read, mask


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result of `function`."""
    start = time.perf_counter()
    result = function()
    return (time.perf_counter() - start) * 1000, result


def _rate(maker: BatchMaker, seconds: float) -> float:
    """Return tokens per second that one worker makes of this rank's shares."""
    batches = BatchLoader(maker, 0, None, workers=1)
    next(batches)
    start, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += batch.tokens
        if time.perf_counter() - start > seconds:
            break
    return tokens / (time.perf_counter() - start)


def _wait(maker: BatchMaker, consumption: int, seconds: float) -> float:
    """Share of the time that a rank waits for one worker, if it trains on `consumption` tokens per second."""
    batches = BatchLoader(maker, 0, None, workers=1)
    waited, trained = 0.0, next(batches).tokens / consumption
    time.sleep(trained)
    while waited + trained < seconds:
        milliseconds, batch = _timed(lambda: next(batches))
        waited += milliseconds / 1000
        trained += batch.tokens / consumption
        time.sleep(batch.tokens / consumption)
    return waited / (waited + trained)


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


if __name__ == "__main__":
    fire.Fire(loader)
