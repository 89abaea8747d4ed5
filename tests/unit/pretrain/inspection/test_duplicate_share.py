"""How many documents have a near-duplicate, compared with brute force."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pretrain.corpus.reader import Corpus
from pretrain.inspection import near_duplicates, sample
from pretrain.inspection.near_duplicates import NGRAM, THRESHOLD, NearDuplicates, find_near_duplicates
from pretrain.inspection.sample import draw_sample

MakeCorpus = Callable[..., Corpus]

RANDOM = np.random.default_rng(1)
SHORT = [[7], [7], [8], [7, 8], [7, 8], [8, 7], [9, 9, 9, 9], [9, 9, 9, 9, 9]]


def changed(ids: np.ndarray, changes: int) -> np.ndarray:
    """A copy with other tokens at random places."""
    copy = ids.copy()
    copy[RANDOM.choice(len(ids), changes, replace=False)] = RANDOM.integers(5, 1000, changes)
    return copy


def random_documents(count: int, longest: int = 200) -> list[np.ndarray]:
    return [RANDOM.integers(5, 1000, RANDOM.integers(20, longest)) for _ in range(count)]


def ngrams(ids: np.ndarray) -> set[tuple[int, ...]]:
    """A shorter document is one n-gram."""
    return {tuple(ids[at : at + NGRAM].tolist()) for at in range(max(1, len(ids) - NGRAM + 1))}


def jaccard(first: set[tuple[int, ...]], second: set[tuple[int, ...]]) -> float:
    return len(first & second) / len(first | second)


def nothing(_: float) -> None:
    """Progress that nobody sees."""


@pytest.mark.parametrize("block", [50, 2**16])
def test_the_same_documents_are_found_as_by_brute_force(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Catches near-duplicates that are missed at the ends of documents, blocks and shards, or if they are short;
    documents that are compared with themselves; and pairs that are not similar."""
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    documents = random_documents(60)
    documents += [
        changed(ids, int(len(ids) * share)) for ids, share in zip(documents, np.arange(60) / 600, strict=True)
    ]
    documents += [np.array(ids) for ids in SHORT]
    documents = [documents[at] for at in RANDOM.permutation(len(documents))]
    corpus = make_corpus([documents[:50], documents[50:52], documents[52:]])
    progress: list[float] = []
    found = find_near_duplicates(draw_sample(corpus, 1), progress.append)
    sets = [ngrams(ids) for ids in documents]
    similar = [max(jaccard(own, other) for other in sets if other is not own) for own in sets]
    expected = [at for at, value in enumerate(similar) if value >= THRESHOLD]
    assert 20 < len(expected) < 100
    assert [pair.document.number for pair in found.pairs] == expected
    for pair in found.pairs:
        first, second = pair.document.number, pair.duplicate.number
        assert pair.duplicate.ids.tolist() == documents[second].tolist()
        assert pair.similarity == pytest.approx(jaccard(sets[first], sets[second]))
    assert found.interval == (found.share, found.share)
    assert sum(progress) == corpus.tokens


def test_long_documents_are_compared(make_corpus: MakeCorpus) -> None:
    """Catches near-duplicates that are longer than what is hashed at once."""
    first = RANDOM.integers(5, 1000, 90_000)
    near, far = changed(first, 1200), changed(first, 9000)
    found = find_near_duplicates(draw_sample(make_corpus([[first, near, far]]), 1), nothing)
    assert [pair.document.number for pair in found.pairs] == [0, 1]
    assert found.pairs[0].similarity == pytest.approx(jaccard(ngrams(first), ngrams(near)), abs=0.001)


def test_a_sample_of_documents_gives_an_interval(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sample that is searched for in itself only, that depends on more than the seed, and an interval that
    does not contain the share of the corpus."""
    monkeypatch.setattr(sample, "MAX_DOCUMENTS", 40)
    documents = random_documents(300, longest=30)
    corpus = make_corpus([[*documents, *documents[:100]]])  # half of all documents
    found, again = (find_near_duplicates(draw_sample(corpus, 3), nothing) for _ in range(2))
    assert [pair.document.number for pair in found.pairs] == [pair.document.number for pair in again.pairs]
    assert found.documents == 40
    low, high = found.interval
    assert low < 0.5 < high
    # statsmodels.stats.proportion.proportion_confint(10, 100, method="wilson")
    assert NearDuplicates(100, found.pairs[:10], False).interval == pytest.approx((0.05523, 0.17437), abs=1e-5)


def test_a_document_that_all_others_resemble_is_not_compared_with_all(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches boilerplate that makes the search quadratic."""
    calls = []
    compare = near_duplicates.jaccard
    monkeypatch.setattr(near_duplicates, "jaccard", lambda *given: calls.append(1) or compare(*given))
    boilerplate = RANDOM.integers(5, 1000, 60)
    documents = [np.concatenate([boilerplate, RANDOM.integers(5, 1000, 30)]) for _ in range(100)]
    monkeypatch.setattr(near_duplicates, "_MAX_COMPARISONS", 5)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 100)
    found = find_near_duplicates(draw_sample(make_corpus([documents]), 1), nothing)
    assert found.pairs == ()
    assert len(calls) <= 100 * 6


def test_equal_documents_are_no_candidates_once_found(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches quadratic time and memory in a corpus of many equal documents."""
    seen = []
    candidates = near_duplicates._Wanted.candidates

    def counted(*given: object) -> Iterator[tuple[int, int]]:
        for pair in candidates(*given):
            seen.append(pair)
            yield pair

    monkeypatch.setattr(near_duplicates._Wanted, "candidates", counted)
    found = find_near_duplicates(draw_sample(make_corpus([[RANDOM.integers(5, 1000, 20)] * 100]), 1), nothing)
    assert [pair.duplicate.row for pair in found.pairs] == [1, *[0] * 99]
    assert len(seen) <= 102
