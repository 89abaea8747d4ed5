import numpy as np
import pytest
import torch

from finetune.scores.metrics import document_ranks, ndcg, potentials


def unit_vectors(count: int, seed: int, size: int = 8) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def test_uniformity_is_that_of_wang_and_isola() -> None:
    """Catches another exponent, distances that are not squared, and a vector that is compared with itself. There are
    more vectors than are computed at once."""
    vectors = unit_vectors(600, seed=0)
    # https://github.com/ssnl/align_uniform
    expected = torch.pdist(torch.from_numpy(vectors)).pow(2).mul(-2).exp().mean().log().item()
    assert np.log(potentials(vectors).mean()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("count", "size"), [(30, 8), (1001, 384)])
def test_equal_vectors_are_not_uniform_and_find_nothing(count: int, size: int) -> None:
    """Catches a collapsed model with a perfect score, as all documents are equally similar, or with a better one than
    the last rank, as products of equal vectors differ by rounding; and a rank of 0, of which there is no inverse, for
    vectors that are not numbers."""
    vectors, numbers = np.repeat(unit_vectors(1, seed=0, size=size), count, axis=0), np.arange(count)
    assert potentials(vectors) == pytest.approx(np.ones(count), abs=1e-5)
    assert document_ranks(vectors, vectors, numbers, numbers) == [count] * count
    nearly = vectors[:2] * np.array([[1.0], [1 + 2e-7]], dtype=np.float32)  # by the padding of their batches
    assert document_ranks(vectors[:2], nearly, numbers[:2], numbers[:2]) == [2, 2]
    assert potentials(vectors[:1]) == [1.0]
    assert document_ranks(vectors * np.nan, vectors, numbers, numbers) == [count] * count


def test_a_text_is_no_document_of_itself() -> None:
    """Catches pairs in both directions, of which a perfect model finds the text itself first."""
    vectors = unit_vectors(2, seed=0)[[0, 0, 1, 1]]  # of A, B, C, D
    own = np.array([1, 0, 3, 2])
    assert document_ranks(vectors, vectors, own, own) == [2] * 4  # as many as are equally similar
    assert document_ranks(vectors, vectors, own, np.arange(4)) == [1] * 4


def test_ranks_and_ndcg() -> None:
    """Catches ranks from 0, an ideal order that is longer than the cutoff, and documents beyond it that count."""
    from sklearn.metrics import ndcg_score

    queries, documents = unit_vectors(300, seed=1), unit_vectors(40, seed=2)
    relevant = np.random.default_rng(3).permuted(np.tile(np.arange(40), (300, 1)), axis=1)[:, :12]
    ranks = np.array([document_ranks(queries, documents, *[relevant[:, number]] * 2) for number in range(12)]).T
    order = np.argsort(-(queries @ documents.T), axis=1)
    for query in range(300):
        assert [order[query, rank - 1] for rank in ranks[query]] == relevant[query].tolist()
    gains = np.zeros((300, 40))
    np.put_along_axis(gains, relevant, 1, axis=1)
    expected = ndcg_score(gains, queries @ documents.T, k=10)
    assert np.mean([ndcg(row) for row in ranks.tolist()]) == pytest.approx(expected)
