"""The computation of a run: steps, tokens and microbatches of each stage, from the run's own stream of batches. Of a
fork, without the steps of its parent.

Steps and tokens are exact. The shape of microbatches is the largest in a sample of each stage's batches; other figures
are means over the sample.
"""

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from pretrain.batching.batch_maker import BatchMaker, padded_predictions
from pretrain.batching.order import CorpusStream, ShuffledOrder
from pretrain.batching.sequences import SequenceIndex
from pretrain.config import MaskingConfig
from pretrain.plan.activations import MicrobatchShape
from pretrain.training_stream import TrainingStream

_BLOCK = 1 << 20  # sequences whose lengths are read at once
_SAMPLED_BATCHES = 16
_SAMPLED_SEQUENCES = 200_000  # in all of them: a second of packing


@dataclass(frozen=True)
class BatchShape:
    tokens: int  # without padding
    squared_lengths: int  # sum over its sequences
    text_tokens: int  # without special tokens
    microbatches: int  # of each rank
    largest: MicrobatchShape
    filled: float  # tokens per computed slot


@dataclass(frozen=True)
class MeanBatch:
    """Means over a sample of batches, see `BatchShape`."""

    tokens: int
    squared_lengths: int
    text_tokens: int
    filled: float


@dataclass(frozen=True)
class StageWork:
    first_step: int
    steps: int | None  # None: a time budget ends it
    sequences: int  # of a full batch
    max_seq_length: int
    tokens: int | None  # exact, of all its batches; None: unknown
    batch: BatchShape  # the one with the largest microbatches of a sample
    mean: MeanBatch  # of the sample

    def tokens_per_step(self) -> float:
        return self.mean.tokens if self.tokens is None or not self.steps else self.tokens / self.steps


def stage_work(stream: TrainingStream, masking: MaskingConfig) -> tuple[StageWork, ...]:
    """Return the work of each stage, without those that end before the run begins."""
    return tuple(
        _stage(maker, order, first, max(first, stream.begin), end, max(masking.rates))
        for maker, order, first, end in zip(stream.makers, stream.orders, stream.first_steps, stream.ends, strict=True)
        if end is None or end > stream.begin
    )


def _stage(
    maker: BatchMaker, order: ShuffledOrder, first_step: int, begin: int, end: int | None, rate: float
) -> StageWork:
    """Return the work of a stage from step `begin` on. All of its batches are sampled."""
    # The last batch may be short, and early ones are during batch warmup.
    first = max(first_step, order.sizes.warmup_steps)
    last = first + _SAMPLED_BATCHES if end is None else max(first_step, end - 2)
    first = min(first, last)
    count = max(1, min(_SAMPLED_BATCHES, _SAMPLED_SEQUENCES // order.sizes.sequences))
    batches = [_batch_shape(maker, int(step), rate) for step in np.unique(np.linspace(last, first, count, dtype=int))]
    return StageWork(
        first_step=begin,
        steps=None if end is None else end - begin,
        sequences=order.sizes.sequences,
        max_seq_length=maker.layout.max_seq_length,
        tokens=None if end is None else _tokens(maker, order, end) - _tokens(maker, order, begin),
        batch=max(batches, key=lambda batch: (batch.largest.rows * batch.largest.width, batch.largest.predicted)),
        mean=MeanBatch(
            tokens=round(fmean(batch.tokens for batch in batches)),
            squared_lengths=round(fmean(batch.squared_lengths for batch in batches)),
            text_tokens=round(fmean(batch.text_tokens for batch in batches)),
            filled=fmean(batch.filled for batch in batches),
        ),
    )


def _tokens(maker: BatchMaker, order: ShuffledOrder, end: int) -> int:
    """Return the tokens of the stage's batches before step `end`, special tokens included."""
    counts = order.positions_by_corpus(order.start(end))
    return sum(
        _stream_tokens(corpus.index, stream, int(count), maker.vocabulary.num_special_tokens)
        for corpus, stream, count in zip(maker.corpora, order.corpora, counts, strict=True)
    )


def _stream_tokens(index: SequenceIndex, stream: CorpusStream, positions: int, special: int) -> int:
    """Return tokens of the first `positions` positions of a corpus's stream. Reads at most half of the lengths: of the
    last epoch's sequences, or of the sequences that it does not reach."""
    epochs, rest = divmod(positions, len(index))
    whole = int(index.starts[-1]) + special * len(index)
    if rest > len(index) // 2:
        unread = range(rest, len(index))
        return (epochs + 1) * whole - _epoch_tokens(index, stream, epochs, unread, special)
    return epochs * whole + _epoch_tokens(index, stream, epochs, range(rest), special)


def _epoch_tokens(index: SequenceIndex, stream: CorpusStream, epoch: int, part: range, special: int) -> int:
    tokens = special * len(part)
    for start in range(part.start, part.stop, _BLOCK):
        before = epoch * stream.sequences
        _, ids = stream.at(range(before + start, before + min(start + _BLOCK, part.stop)))
        tokens += int(index.lengths(ids).sum())
    return tokens


def _batch_shape(maker: BatchMaker, step: int, rate: float) -> BatchShape:
    _, text_lengths, assignment = maker.assign(step)
    special, ranks = maker.vocabulary.num_special_tokens, maker.world.size
    lengths = text_lengths + special
    microbatch = assignment.rank * assignment.microbatches + assignment.microbatch
    count = ranks * assignment.microbatches
    text = np.bincount(microbatch, weights=text_lengths, minlength=count)
    # Each text token is drawn with probability `rate`: the most of many batches, three standard deviations above.
    predicted = text.max() * rate + 3 * np.sqrt(text.max() * rate * (1 - rate))
    rows = int(assignment.rows[0])
    largest = MicrobatchShape(  # padded ones become narrower
        rows=rows,
        width=int(assignment.widths[0]),
        predicted=padded_predictions(int(predicted), maker.layout.kind),
        sequences=int(np.bincount(microbatch, minlength=count).max()) + rows,
    )
    tokens = int(lengths.sum())
    return BatchShape(
        tokens=tokens,
        squared_lengths=int((lengths * lengths).sum()),
        text_tokens=int(text_lengths.sum()),
        microbatches=assignment.microbatches,
        largest=largest,
        filled=tokens / int(ranks * assignment.bounds[-1]),
    )
