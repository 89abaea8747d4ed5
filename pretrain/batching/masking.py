"""The tokens to predict, and the inputs of the model in their place.

Every sequence draws from a counter-based generator keyed by (seed, corpus, stage, epoch, sequence), so its masks do not
depend on rank, microbatch or restarts, and are new in each epoch. The masking unit is a token (Devlin et al. 2019,
section 3.1), a whole word, or a span of words (Joshi et al. 2020, section 3.1). With each of them, every token has the
same probability of being predicted, in sequences of any length.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64, fold_in, make_key, randint, random_bits, uniform
from pretrain.batching.order import BatchSequences
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig


class Ranges(NamedTuple):
    """R ranges [start, start + size) of tokens, words or slots."""

    starts: NDArray[np.int64]  # [R]
    sizes: NDArray[np.int64]  # [R]

    def indices(self) -> NDArray[np.int64]:
        """Return the indices of every range, concatenated; shape [sum of sizes]."""
        before = np.cumsum(self.sizes) - self.sizes
        indices: NDArray[np.int64] = np.arange(self.sizes.sum()) + np.repeat(self.starts - before, self.sizes)
        return indices


MAX_SPAN_WORDS = 10  # as in SpanBERT
_SPAN_END_PROBABILITY = 0.2  # after each word, before lengths above the maximum are redrawn


@dataclass(frozen=True)
class MaskingSchedule:
    """A masking rate that changes over a run of `steps` steps (cf. Yang et al. 2023, "Learning better masking for
    better language model pre-training", who decrease it)."""

    rates: tuple[float, ...]
    schedule: Literal["linear", "stepped"]
    steps: int

    def at(self, step: int) -> float:
        """Return the rate at `step`. Linear: interpolated between the rates, which are equally spaced over the run; the
        first and last step have the first and last rate. Stepped: each rate for an equal part of the run."""
        if self.schedule == "stepped":
            return self.rates[min(step * len(self.rates) // self.steps, len(self.rates) - 1)]
        at = step / max(1, self.steps - 1) * (len(self.rates) - 1)
        return float(np.interp(at, np.arange(len(self.rates)), self.rates))


class MaskedText(NamedTuple):
    """The T text tokens of several sequences, concatenated."""

    tokens: NDArray[np.int64]  # [T]
    inputs: NDArray[np.int64]  # [T] of the model
    masked: NDArray[np.int64]  # [M] indices of the predicted tokens, ascending


class _TokenStreams(NamedTuple):
    """The random stream of each token's sequence, and the token's position in the sequence."""

    keys: U64  # [T]
    positions: NDArray[np.int64]  # [T]

    def unit_bits(self, tokens: NDArray[np.int64] | slice) -> U64:
        """Return random words that decide whether the units that begin with these tokens are chosen."""
        return random_bits(self.keys[tokens], 2 * self.positions[tokens])

    def replacement_bits(self, tokens: NDArray[np.int64]) -> U64:
        """Return random words that decide the inputs in place of these tokens."""
        return random_bits(self.keys[tokens], 2 * self.positions[tokens] + 1)


@dataclass(frozen=True)
class Masker:
    """Masks the sequences of one corpus with one seed."""

    vocabulary: Vocabulary
    masking: MaskingConfig
    seed: int
    corpus: str  # fingerprint
    stage: int = 0

    def _keys(self, sequences: BatchSequences) -> U64:
        """Return the key of each sequence's random stream [S]."""
        stream = make_key(("masks", self.seed, self.corpus, self.stage))
        return fold_in(fold_in(stream, sequences.epochs), sequences.ids)

    def mask(
        self,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        sequences: BatchSequences,
        word_starts: NDArray[np.bool_] | None = None,
        rate: float | None = None,
    ) -> MaskedText:
        """Mask the text tokens [T] of S sequences with these lengths [S] (sum: T).

        Special tokens (text contains only the unknown token) are never predicted, even inside a chosen unit.

        Args:
            word_starts: [T], which tokens begin a word; None: as the tokenizer's word boundaries say. The first token
                of a sequence always does.
            rate: of masking; None: that of the config, of several the last.
        """
        rate, keys = self.masking.rates[-1] if rate is None else rate, self._keys(sequences)
        starts = np.cumsum(lengths) - lengths
        streams = _TokenStreams(np.repeat(keys, lengths), np.arange(len(tokens)) - np.repeat(starts, lengths))
        if self.masking.unit == "token":
            units = _choose_tokens(streams, rate)
        else:
            words = self._words(tokens, starts, word_starts)
            if self.masking.unit == "word":
                units = _choose_words(words, streams, rate)
            else:
                units = _choose_spans(words, len(tokens), starts, keys, rate)

        indices = units.indices()
        maskable = ~self.vocabulary.unmaskable[tokens[indices]]
        indices = indices[maskable]
        # The high bits decide between mask, random and unchanged, a hash of the bits selects a random id. In a span,
        # all tokens share the decision for the first (SpanBERT, section 3.1); BERT's whole-word masking decides for
        # each token.
        bits = streams.replacement_bits(indices)
        action = uniform(bits)
        if self.masking.unit == "span":
            action = uniform(streams.replacement_bits(np.repeat(units.starts, units.sizes)[maskable]))
        return MaskedText(tokens, self._replace(tokens, indices, action, bits), indices)

    def _words(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], word_starts: NDArray[np.bool_] | None
    ) -> Ranges:
        """Return the words of sequences that start at the tokens `starts` [S]. A word never crosses sequences."""
        if word_starts is None:
            assert self.vocabulary.word_boundaries is not None, "rejected when the run was resolved"
            word_starts = self.vocabulary.word_boundaries.word_starts(tokens)
        begins = word_starts.copy()
        begins[starts] = True
        firsts = np.flatnonzero(begins)
        return Ranges(firsts, np.diff(firsts, append=len(tokens)))

    def _replace(
        self, tokens: NDArray[np.int64], indices: NDArray[np.int64], action: NDArray[np.float64], bits: U64
    ) -> NDArray[np.int64]:
        """Return the inputs of the model [T]. `action` [M] in [0, 1) decides between mask, random and unchanged."""
        mask_share, random_share = self.masking.mask_share, self.masking.random_share
        inputs = tokens.copy()
        inputs[indices[action < mask_share]] = self.vocabulary.mask_id
        random = (action >= mask_share) & (action < mask_share + random_share)
        drawn = randint(fold_in(0, bits[random]), len(self.vocabulary.replacements))
        inputs[indices[random]] = self.vocabulary.replacements[drawn]
        return inputs


def _choose_tokens(streams: _TokenStreams, rate: float) -> Ranges:
    chosen = np.flatnonzero(uniform(streams.unit_bits(slice(None))) < rate)
    return Ranges(chosen, np.ones_like(chosen))


def _choose_words(words: Ranges, streams: _TokenStreams, rate: float) -> Ranges:
    chosen = uniform(streams.unit_bits(words.starts)) < rate
    return Ranges(words.starts[chosen], words.sizes[chosen])


def _choose_spans(words: Ranges, tokens: int, starts: NDArray[np.int64], keys: U64, rate: float) -> Ranges:
    first_words = np.searchsorted(words.starts, starts)
    spans = draw_spans(np.diff(first_words, append=len(words.starts)), keys, rate)
    ends = np.append(words.starts, tokens)[spans.starts + spans.sizes]
    return Ranges(words.starts[spans.starts], ends - words.starts[spans.starts])


def span_lengths() -> NDArray[np.float64]:
    """P(length = 1 … 10 words): SpanBERT's geometric distribution with p = 0.2, truncated at 10; its mean is 3.8.

    As in SpanBERT's code and figure 2, lengths above 10 are redrawn rather than clipped to 10 (a mean of 4.5).
    """
    unnormalized = np.cumprod(np.full(MAX_SPAN_WORDS, 1 - _SPAN_END_PROBABILITY))
    lengths: NDArray[np.float64] = unnormalized / unnormalized.sum()
    return lengths


def draw_spans(words: NDArray[np.int64], keys: U64, rate: float) -> Ranges:
    """Draw spans that cover each word of each sequence with probability `rate`. Pure in each sequence's key.

    SpanBERT draws spans until it has covered the required share of a sequence, which short sequences cannot meet: it
    masks at least one of 3 tokens, always. Here a sequence is a random excerpt of an endless text, in which each word
    outside a span starts one with probability q or else is not covered. Span lengths L follow `span_lengths`, with mean
    μ. This is an alternating renewal process: on average, (1 - q) / q uncovered words are followed by μ covered ones,
    so the covered share is

        μ / (μ + (1 - q) / q) = rate      for      q = rate / (rate + μ (1 - rate)).

    The excerpt starts in equilibrium (Cox, Renewal Theory, 1962, section 5.2): with probability `rate` inside a span,
    of which R words remain with P(R = k) = P(L ≥ k) / μ; otherwise on an uncovered word. Each of its words is then
    covered with probability `rate` exactly, however short it is. Spans may be cut at both ends of a sequence; two spans
    may be adjacent (with probability q) but do not overlap.

    Args: words [S] per sequence, at least 1; keys [S]. Returns ranges of words, numbered over all sequences; no span
    crosses from one sequence into the next.
    """
    first, size_classes = np.cumsum(words) - words, np.frexp(words.astype(np.float64))[1]
    spans = [np.empty((2, 0), np.int64)]
    for size_class in np.unique(size_classes):  # so that a long sequence costs the short ones nothing
        alike = np.flatnonzero(size_classes == size_class)
        sequence, begins, sizes = _draw_spans_of_similar(words[alike], keys[alike], rate)
        spans.append(np.stack([first[alike][sequence] + begins, sizes]))
    starts, sizes = np.concatenate(spans, axis=1)
    order = np.argsort(starts)
    return Ranges(starts[order], sizes[order])


def _draw_spans_of_similar(
    words: NDArray[np.int64], keys: U64, rate: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`draw_spans` of sequences of similar length: the sequence of each span, its first word in it, and its words."""
    lengths = span_lengths()
    mean = float((lengths * np.arange(1, MAX_SPAN_WORDS + 1)).sum())
    start_probability = rate / (rate + mean * (1 - rate))
    longer = np.cumsum(lengths[::-1])[::-1]  # P(L ≥ k)
    # Inverse distribution functions as tables, which are bit-identical on every machine, unlike logarithms.
    longest = int(words.max())
    gap_table = 1 - np.cumprod(np.full(longest, 1 - start_probability))
    length_table, rest_table = np.cumsum(lengths)[:-1], np.cumsum(longer / mean)[:-1]

    # Cycle j of a sequence is its j-th gap and the span after it, drawn with counter 2j. Drawing twice the expected
    # number of cycles is usually enough; the number does not affect the result.
    cycles = 4 + int(2 * longest * rate / mean)
    while True:
        drawn = random_bits(keys[:, None], 2 * np.arange(cycles))
        for_gap, for_size = uniform(drawn), uniform(fold_in(0, drawn))
        gap = np.searchsorted(gap_table, for_gap, side="right")
        size = 1 + np.searchsorted(length_table, for_size, side="right")
        inside = for_gap[:, 0] < rate
        outside = 1 + np.searchsorted(gap_table, (for_gap[:, 0] - rate) / (1 - rate), side="right")
        gap[:, 0] = np.where(inside, 0, outside)
        size[inside, 0] = 1 + np.searchsorted(rest_table, for_size[inside, 0], side="right")
        ends = np.cumsum(gap + size, axis=1)
        if (ends[:, -1] >= words).all():
            break
        cycles *= 2
    begins, ends = ends - size, np.minimum(ends, words[:, None])
    sequence, cycle = np.nonzero(begins < words[:, None])
    return sequence, begins[sequence, cycle], (ends - begins)[sequence, cycle]
