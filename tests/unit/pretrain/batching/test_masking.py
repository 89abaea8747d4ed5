import dataclasses
import hashlib

import numpy as np
import pytest

from pretrain.batching import masking
from pretrain.batching.counter_rng import fold_in, random_bits
from pretrain.batching.masking import MAX_SPAN_WORDS, Masker, Ranges, draw_spans
from pretrain.batching.order import BatchSequences
from pretrain.config import MaskingConfig

MASK, UNK = 4, 3
UNITS = ("token", "word", "span")
KEYS = fold_in(1, np.arange(200_000))


@pytest.fixture
def stats():
    """scipy.stats, whose import takes a second: in the test process that needs it only."""
    from scipy import stats

    return stats


@pytest.fixture
def masker(vocabulary):
    return Masker(vocabulary, MaskingConfig(), seed=11, corpus="corpus")


def of(masker, **changes):
    return dataclasses.replace(masker, masking=masker.masking.model_copy(update=changes))


def sequences(ids, epoch=0):
    return BatchSequences(np.zeros(len(ids), np.int64), np.full(len(ids), epoch), np.asarray(ids))


def text(length, seed=0):
    """Token ids of which a third, the multiples of 3, continue a word."""
    return np.random.default_rng(seed).integers(5, 2000, length)


def words_of(tokens, lengths):
    """The word number of each token, by the word boundaries of the fixture."""
    starts = tokens % 3 != 0
    starts[np.cumsum(lengths) - lengths] = True
    return np.cumsum(starts) - 1


def flags(chosen, length):
    found = np.zeros(length, dtype=bool)
    found[chosen] = True
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_shares_are_those_of_the_config(masker, unit):
    """Catches a wrong threshold: 15 % chosen, of those 80 % [MASK], 10 % random, 10 % unchanged.

    Within 4 sigma for as many draws as there are units, since the tokens of a unit share one draw.
    """
    masker = of(masker, unit=unit)
    lengths = np.full(4000, 100)
    tokens = text(lengths.sum())
    _, shown, chosen = masker.mask(tokens, lengths, sequences(np.arange(4000)))
    before, after = tokens[chosen], shown[chosen]
    # Tokens that share a draw, averaged over tokens: words have 1.5 tokens, spans 3.8 words, long ones count more.
    chosen_together = {"token": 1, "word": 2, "span": 9}[unit]
    decided_together = {"token": 1, "word": 1, "span": 9}[unit]
    n, units = len(tokens), len(chosen) / decided_together
    assert len(chosen) / n == pytest.approx(0.15, abs=4 * (0.15 * 0.85 * chosen_together / n) ** 0.5)
    assert (after == MASK).mean() == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / units) ** 0.5)
    assert (after == before).mean() == pytest.approx(0.1 + 0.1 / 4995, abs=4 * (0.1 * 0.9 / units) ** 0.5)
    others = ~flags(chosen, n)
    assert np.array_equal(tokens[others], shown[others])


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("unit", UNITS)
def test_the_rate_holds_at_every_place_of_sequences_of_every_length(masker, unit, length, rate):
    """Catches short sequences that are always or never masked, and first or last tokens that are masked less."""
    masker = of(masker, unit=unit, rate=rate)
    count = 20_000
    lengths = np.full(count, length)
    *_, chosen = masker.mask(text(count * length), lengths, sequences(np.arange(count)))
    share = flags(chosen, count * length).reshape(count, length).mean(axis=0)  # sequences are independent
    assert share == pytest.approx(np.full(length, rate), abs=4.5 * (rate * (1 - rate) / count) ** 0.5)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_chosen_as_a_whole_and_end_with_their_sequence(masker, unit, stats):
    """Catches partial words, and words that cross from one sequence into the next."""
    masker = of(masker, unit=unit, rate=0.3)
    lengths = np.random.default_rng(2).integers(1, 30, 3000)
    tokens = text(lengths.sum())
    *_, chosen = masker.mask(tokens, lengths, sequences(np.arange(3000)))
    words = words_of(tokens, lengths)
    share = np.bincount(words, flags(chosen, len(tokens))) / np.bincount(words)
    assert set(share) == {0.0, 1.0}
    # The first word of a sequence knows nothing of the last one before it, though their tokens would make one word.
    first = words[np.cumsum(lengths) - lengths][1:]
    table = np.histogram2d(share[first - 1], share[first], bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("unit", ["word", "span"])
def test_word_starts_can_be_given(masker, unit):
    """Catches a segmenter's word starts that are ignored, or whose array is modified in place."""
    masker = of(masker, unit=unit, rate=0.3)
    lengths = np.full(500, 40)
    tokens = np.full(lengths.sum(), 7)  # each a word by the marks
    word_starts = np.arange(len(tokens)) % 4 == 2
    given = word_starts.copy()
    *_, chosen = masker.mask(tokens, lengths, sequences(np.arange(500)), given)
    assert np.array_equal(given, word_starts)
    masked = flags(chosen, len(tokens)).reshape(500, 40)
    inner = masked[:, 2:38].reshape(500, 9, 4)
    assert (inner.all(axis=2) | ~inner.any(axis=2)).all()
    assert (masked[:, 0] == masked[:, 1]).all()
    assert (masked[:, 38] == masked[:, 39]).all()
    assert (masked[:, 1] != masked[:, 2]).any()


def test_each_token_of_a_word_has_its_own_replacement(masker, stats):
    """Catches words whose tokens share the 80/10/10 draw: BERT's whole-word masking decides for each."""
    shown, pairs = pairs_of_tokens(of(masker, unit="word"))
    masked = (shown == MASK)[pairs]
    assert stats.chi2_contingency(np.histogram2d(*masked.T, bins=2)[0]).pvalue > 1e-3


def test_all_tokens_of_a_span_share_the_decision(masker):
    """Catches spans that are only partly replaced by [MASK], and one random id for a whole span."""
    shown, pairs = pairs_of_tokens(of(masker, unit="span", mask_share=0.4, random_share=0.3))
    masked, kept = (shown == MASK)[pairs], (shown < 10)[pairs] & (shown != MASK)[pairs]
    assert (masked[:, 0] == masked[:, 1]).all()
    assert (kept[:, 0] == kept[:, 1]).mean() > 0.99  # a random id may be one of the text's
    replaced = shown[pairs][~masked.any(axis=1) & ~kept.any(axis=1)]
    assert len(replaced) > 1000
    assert (replaced[:, 0] == replaced[:, 1]).mean() < 0.01


def pairs_of_tokens(masker):
    """The inputs, and the token indices of each chosen word of two tokens [n, 2]."""
    lengths = np.full(3000, 40)
    tokens = np.tile([8, 9], lengths.sum() // 2)  # 9 continues the word that 8 begins
    _, shown, chosen = masker.mask(tokens, lengths, sequences(np.arange(3000)))
    pairs = chosen.reshape(-1, 2)
    assert (np.diff(pairs) == 1).all()
    return shown, pairs


def test_span_lengths_are_truncated_geometric(stats):
    """Catches a wrong distribution (chi-square), such as lengths clipped to 10, whose mean is 4.5."""
    words = np.full(500, 4000)
    spans = draw_spans(words, KEYS[:500], 0.15)
    whole = spans.sizes[(spans.starts % 4000 > 0) & ((spans.starts + spans.sizes) % 4000 > 0)]
    lengths = np.arange(1, MAX_SPAN_WORDS + 1)
    expected = 0.2 * 0.8 ** (lengths - 1) / (1 - 0.8**MAX_SPAN_WORDS)
    assert whole.mean() == pytest.approx(3.797, abs=0.03)
    counts = np.bincount(whole, minlength=MAX_SPAN_WORDS + 1)[1:]
    assert stats.chisquare(counts, expected * len(whole)).pvalue > 1e-3


def test_gaps_between_spans_are_geometric(stats):
    """Catches spans that avoid or attract each other. After an uncovered word, a span starts with probability q."""
    spans = draw_spans(np.full(500, 4000), KEYS[:500], 0.15)
    gaps = np.concatenate(
        [
            np.diff(of_sequence) - size[:-1]
            for of_sequence, size in zip(*by_sequence(spans, 4000, 500), strict=True)
            if len(of_sequence) > 1
        ]
    )
    q = 0.15 / (0.15 + 3.797097503983286 * 0.85)
    edges = np.arange(41)
    expected = np.append(q * (1 - q) ** edges[:-1], (1 - q) ** 40)
    counts = np.bincount(np.minimum(gaps, 40), minlength=41)
    assert stats.chisquare(counts, expected * len(gaps)).pvalue > 1e-3


def test_a_long_sequence_costs_short_ones_nothing(monkeypatch):
    """Catches as many draws for each sequence as the longest one needs, and spans that depend on other sequences."""
    drawn = []
    monkeypatch.setattr(masking, "random_bits", lambda *given: drawn.append(random_bits(*given)) or drawn[-1])
    words = np.full(500, 20)
    words[[7, 300]] = 5000, 90
    spans = draw_spans(words, KEYS[:500], 0.15)
    assert sum(bits.size for bits in drawn) < words.sum()
    first = np.cumsum(words) - words
    for sequence in (6, 7, 300):
        alone = draw_spans(words[[sequence]], KEYS[[sequence]], 0.15)
        own = np.searchsorted(first, spans.starts, side="right") - 1 == sequence
        assert (spans.starts[own] - first[sequence]).tolist() == alone.starts.tolist()
        assert spans.sizes[own].tolist() == alone.sizes.tolist()


def by_sequence(spans, words, count):
    where = np.searchsorted(spans.starts, np.arange(1, count) * words)
    return np.split(spans.starts, where), np.split(spans.sizes, where)


def test_a_sequence_begins_like_an_excerpt_of_an_endless_text(stats):
    """Catches a first span drawn like the others: the rest of it has the equilibrium distribution."""
    spans = draw_spans(np.full(100_000, 20), KEYS[:100_000], 0.3)
    at_start = spans.sizes[spans.starts % 20 == 0]
    lengths = np.arange(1, MAX_SPAN_WORDS + 1)
    geometric = 0.2 * 0.8 ** (lengths - 1) / (1 - 0.8**MAX_SPAN_WORDS)
    left = geometric[::-1].cumsum()[::-1]
    left /= left.sum()
    counts = np.bincount(at_start, minlength=MAX_SPAN_WORDS + 1)[1:]
    assert stats.chisquare(counts, left * len(at_start)).pvalue > 1e-3


def test_spans_neither_overlap_nor_cross_sequences():
    """Catches spans that cross sequences or overlap, also at a rate that covers nearly all words."""
    words = np.random.default_rng(4).integers(1, 60, 5000)
    for rate in (0.01, 0.15, 0.9, 0.99):
        spans = draw_spans(words, KEYS[:5000], rate)
        assert (spans.sizes >= 1).all()
        assert (np.diff(spans.starts) >= spans.sizes[:-1]).all()
        ends = np.cumsum(words)
        assert (spans.starts + spans.sizes <= ends[np.searchsorted(ends, spans.starts, side="right")]).all()


def test_empty_ranges():
    """Catches a rank that has no sequence in a batch, or a batch without a masked token."""
    none = np.zeros(0, dtype=np.int64)
    assert Ranges(none, none).indices().tolist() == []
    assert draw_spans(none, KEYS[:0], 0.15).starts.tolist() == []


@pytest.mark.parametrize("unit", UNITS)
def test_a_rank_without_sequences(masker, unit):
    """Catches ranks that fail because a small batch has no sequence for them."""
    none = np.zeros(0, dtype=np.int64)
    _, shown, chosen = of(masker, unit=unit).mask(none, none, sequences(none))
    assert len(shown) == len(chosen) == 0


def test_random_replacements_are_real_words_evenly_drawn(masker, stats):
    """Catches replacements by special ids, and draws that are not uniform or correlate with the 80/10/10 decision."""
    lengths = np.full(5000, 100)
    tokens = np.full(lengths.sum(), 5)
    for unit in UNITS:
        for random_share, bins in ((1.0, 4995), (0.1, 45)):
            often = of(masker, unit=unit, rate=0.5, mask_share=1 - random_share, random_share=random_share)
            _, shown, chosen = often.mask(tokens, lengths, sequences(np.arange(5000)))
            drawn = shown[chosen][shown[chosen] != MASK]
            assert drawn.min() >= 5
            assert stats.chisquare(np.bincount((drawn - 5) * bins // 4995, minlength=bins)).pvalue > 1e-3


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_are_never_chosen(masker, unit):
    """Catches a masked unknown token, which teaches nothing, also inside a word whose other tokens are masked."""
    masker = of(masker, unit=unit, rate=0.9)
    tokens = np.tile([7, UNK, 9], 500)  # a single word by the fixture: neither 3 nor 9 begins one
    *_, chosen = masker.mask(tokens, np.array([1500]), sequences([0]))
    assert set(tokens[chosen]) == {7, 9}


@pytest.mark.parametrize("unit", UNITS)
def test_masks_depend_on_the_sequence_and_epoch_not_on_the_batch(masker, unit):
    """Catches masks that depend on rank, microbatch or restarts, or that repeat in the next epoch."""
    masker = of(masker, unit=unit)
    lengths = np.array([40, 160, 3000])
    tokens = text(lengths.sum(), seed=1)
    _, shown, _ = masker.mask(tokens, lengths, sequences([8, 3, 5]))
    _, alone, _ = masker.mask(tokens[40:200], lengths[1:2], sequences([3]))
    assert np.array_equal(shown[40:200], alone)
    for changed, epoch in (
        (masker, 1),
        (dataclasses.replace(masker, seed=12), 0),
        (dataclasses.replace(masker, corpus="other"), 0),
        (dataclasses.replace(masker, stage=1), 0),
    ):
        _, other, _ = changed.mask(tokens[40:200], lengths[1:2], sequences([3], epoch))
        assert not np.array_equal(other, alone)


@pytest.mark.parametrize("unit", UNITS)
def test_epochs_are_independent(masker, unit):
    """Catches keys of epochs that correlate: what one epoch masks, the next must mask as often as anything else."""
    masker = of(masker, unit=unit)
    lengths = np.full(3000, 40)
    tokens = text(lengths.sum())
    before, after = (
        flags(masker.mask(tokens, lengths, sequences(np.arange(3000), epoch)).masked, len(tokens)) for epoch in (0, 1)
    )
    together = {"token": 1, "word": 2, "span": 9}[unit]  # tokens that share a draw, as above
    deviation = (0.15 * 0.85 * together / before.sum()) ** 0.5
    assert after[before].mean() == pytest.approx(0.15, abs=4 * deviation)


@pytest.mark.parametrize("unit", ["token", "word"])
def test_a_higher_rate_keeps_the_masks_of_a_lower_one(masker, unit):
    """Catches a rate that is part of the key: a masking schedule must not redraw all masks at each step."""
    tokens, lengths = text(1000), np.array([1000])
    *_, low = of(masker, unit=unit).mask(tokens, lengths, sequences([0]))
    *_, high = of(masker, unit=unit, rate=0.3).mask(tokens, lengths, sequences([0]))
    assert set(low) < set(high)


@pytest.mark.parametrize(
    ("unit", "digest"), [("token", "a7fa85049c7bb2f0"), ("word", "a5d4e113b05e5786"), ("span", "cedc03617d631046")]
)
def test_masks_are_stable_across_versions(masker, unit, digest):
    """Catches a change of any mask: a run started with another version would resume with different masks."""
    lengths = np.arange(1, 60)
    tokens = 3 + np.arange(lengths.sum()) % 4000
    _, shown, chosen = of(masker, unit=unit).mask(tokens, lengths, sequences(np.arange(59), epoch=2))
    assert hashlib.sha256(shown.tobytes() + chosen.tobytes()).hexdigest()[:16] == digest
