"""Which tokens are predicted, and what the model is shown in their place.

Every sequence draws its own random words from a counter-based generator keyed by (seed, corpus, epoch, sequence), so
its masks are the same on whichever rank, in whichever microbatch and after however many restarts, and fresh in each
epoch. What is drawn at once is a token (Devlin et al. 2019, section 3.1), a whole word, or a span of words (Joshi et
al. 2020, section 3.1); under each of them every token has the same chance to be predicted, in sequences of any length.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64, below, draws, fold, key_of, uniform
from pretrain.batching.order import BatchSequences
from pretrain.batching.vocabulary import Vocabulary

LONGEST_SPAN = 10  # in words, as in SpanBERT
_SPAN_STOPS = 0.2  # the chance that a span ends after any of its words, before it is as long as that


@dataclass(frozen=True)
class MaskingPolicy:
    rate: float  # share of the text tokens that are predicted
    mask_share: float  # of those, shown as the mask token
    random_share: float  # of those, shown as a random token; the rest is shown as it is
    unit: Literal["token", "word", "span"] = "token"  # what is chosen at once


class MaskedTokens(NamedTuple):
    shown: NDArray[np.int64]  # [T] what the model sees
    chosen: NDArray[np.int64]  # [M] indices of the predicted tokens, ascending


class Runs(NamedTuple):
    """Stretches [first, first + size) of tokens, words or slots."""

    first: NDArray[np.int64]
    size: NDArray[np.int64]

    def members(self) -> NDArray[np.int64]:
        """[first, first + 1, …] of each run, one after another."""
        before = np.cumsum(self.size) - self.size
        members: NDArray[np.int64] = np.arange(self.size.sum()) + np.repeat(self.first - before, self.size)
        return members


@dataclass(frozen=True)
class Masker:
    """Masks the sequences of one corpus under one seed."""

    vocabulary: Vocabulary
    policy: MaskingPolicy
    seed: int
    corpus: str  # fingerprint
    stage: int = 0

    def at_rate(self, rate: float) -> Self:
        """The same masker, predicting another share of the tokens."""
        return replace(self, policy=replace(self.policy, rate=rate))

    def keys(self, sequences: BatchSequences) -> U64:
        """The key of each sequence's random stream [S]."""
        return fold(fold(key_of(("masks", self.seed, self.corpus, self.stage)), sequences.epochs), sequences.ids)

    def mask(
        self,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        keys: U64,
        word_starts: NDArray[np.bool_] | None = None,
    ) -> MaskedTokens:
        """Mask the text tokens [T] of sequences with these lengths [S] (sum: T) and keys [S].

        `word_starts` [T]: which tokens begin a word; None: the tokenizer's marks tell. A sequence's first token always
        does. A special token (the unknown one is the only one in text) is never predicted, even within a chosen unit.
        """
        first = np.cumsum(lengths) - lengths
        token_keys = np.repeat(keys, lengths)
        within = np.arange(len(tokens)) - np.repeat(first, lengths)

        if self.policy.unit == "token":
            heads = np.flatnonzero(uniform(draws(token_keys, 2 * within)) < self.policy.rate)
            units = Runs(heads, np.ones_like(heads))
        else:
            words = self._words(tokens, first, word_starts)
            if self.policy.unit == "word":
                picked = uniform(draws(token_keys[words.first], 2 * within[words.first])) < self.policy.rate
                units = Runs(words.first[picked], words.size[picked])
            else:
                first_words = np.searchsorted(words.first, first)
                spans = draw_spans(np.diff(first_words, append=len(words.first)), keys, self.policy.rate)
                ends = np.append(words.first, len(tokens))[spans.first + spans.size]
                units = Runs(words.first[spans.first], ends - words.first[spans.first])

        chosen = units.members()
        maskable = ~self.vocabulary.unmaskable[tokens[chosen]]
        chosen = chosen[maskable]
        # One more word a token decides the rest: its high bits what happens to the token, a hash of it which id
        # replaces it. Within a span, what happens to the first token happens to all (SpanBERT, section 3.1); BERT's
        # whole-word masking decides about each token.
        words_of_tokens = draws(token_keys[chosen], 2 * within[chosen] + 1)
        action = uniform(words_of_tokens)
        if self.policy.unit == "span":
            leaders = np.repeat(units.first, units.size)[maskable]
            action = uniform(draws(token_keys[leaders], 2 * within[leaders] + 1))
        shown = tokens.copy()
        shown[chosen[action < self.policy.mask_share]] = self.vocabulary.mask_id
        random = (action >= self.policy.mask_share) & (action < self.policy.mask_share + self.policy.random_share)
        drawn = below(fold(0, words_of_tokens[random]), len(self.vocabulary.replacements))
        shown[chosen[random]] = self.vocabulary.replacements[drawn]
        return MaskedTokens(shown, chosen)

    def _words(
        self, tokens: NDArray[np.int64], first: NDArray[np.int64], word_starts: NDArray[np.bool_] | None
    ) -> Runs:
        """The words of sequences whose first tokens are `first` [S]; none reaches from one into the next."""
        if word_starts is None:
            assert self.vocabulary.word_boundaries is not None, "refused when the run was checked"
            word_starts = self.vocabulary.word_boundaries.word_starts(tokens)
        starts = word_starts.copy()
        starts[first] = True
        heads = np.flatnonzero(starts)
        return Runs(heads, np.diff(heads, append=len(tokens)))


def span_lengths() -> NDArray[np.float64]:
    """P(length = 1 … 10 words): SpanBERT's geometric distribution with p = 0.2, cut off at 10; its mean is 3.8.

    Cut off means that lengths above 10 are drawn again, not that they count as 10, whose mean would be 4.5; so it is
    in SpanBERT's code and in its figure 2.
    """
    falling = np.cumprod(np.full(LONGEST_SPAN, 1 - _SPAN_STOPS))
    lengths: NDArray[np.float64] = falling / falling.sum()
    return lengths


def draw_spans(words: NDArray[np.int64], keys: U64, rate: float) -> Runs:
    """Spans of words that cover each word of each sequence with probability `rate`. Pure in each sequence's key.

    SpanBERT draws spans until the wanted share of a sequence is covered, which no short sequence can hit: of 3 tokens
    it always masks. Here a sequence is a window, cut at random, of an endless text in which every word outside a span
    begins one with probability q, else stays uncovered. Lengths L are drawn from `span_lengths`, with mean μ. This is
    an alternating renewal process: after (1 - q) / q uncovered words on average there are μ covered ones, so the share

        μ / (μ + (1 - q) / q) = rate      for      q = rate / (rate + μ (1 - rate)).

    A window begins in equilibrium (Cox, Renewal Theory, 1962, section 5.2): with probability `rate` inside a span, of
    which R words are left with P(R = k) = P(L ≥ k) / μ; else on an uncovered word. Then every word of it is covered
    with probability `rate` exactly, however short it is. A span at either end may be cut, as words are at the ends of
    sequences; two spans may touch, with probability q, but do not overlap.

    Args: words [S] of each sequence, at least 1; keys [S]. Returns spans in the numbering of all sequences' words; none
    reaches from one sequence into the next.
    """
    lengths = span_lengths()
    mean = float((lengths * np.arange(1, LONGEST_SPAN + 1)).sum())
    begin = rate / (rate + mean * (1 - rate))
    longer = np.cumsum(lengths[::-1])[::-1]  # P(L ≥ k)
    # Inverse distribution functions as tables: unlike logarithms, the same to the last bit on every machine.
    most = int(words.max(initial=0))
    gap_table = 1 - np.cumprod(np.full(most, 1 - begin))
    length_table, rest_table = np.cumsum(lengths)[:-1], np.cumsum(longer / mean)[:-1]

    # Cycle j of a sequence is its j-th gap and the span behind it, drawn with counter 2j. How many are drawn at once
    # is a guess, twice the expected number, and has no effect on the outcome.
    cycles = 4 + int(2 * most * rate / mean)
    while True:
        drawn = draws(keys[:, None], 2 * np.arange(cycles))
        for_gap, for_size = uniform(drawn), uniform(fold(0, drawn))
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
    first = np.cumsum(words) - words
    within = begins < words[:, None]
    return Runs((first[:, None] + begins)[within], (ends - begins)[within])


@dataclass(frozen=True)
class MaskingRate:
    """A masking rate that changes along a run of `steps` steps (cf. Yang et al. 2023, "Learning better masking for
    better language model pre-training", who let it fall)."""

    rates: tuple[float, ...]
    schedule: Literal["linear", "stepped"]
    steps: int

    def at(self, step: int) -> float:
        """Linear: from the first rate at the first step through the others, equally far apart, to the last rate at the
        last step. Stepped: each rate for an equal part of the run."""
        if self.schedule == "stepped":
            return self.rates[min(step * len(self.rates) // self.steps, len(self.rates) - 1)]
        at = step / max(1, self.steps - 1) * (len(self.rates) - 1)
        return float(np.interp(at, np.arange(len(self.rates)), self.rates))
