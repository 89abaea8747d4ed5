"""Metrics of embeddings: pure functions of arrays. Vectors are unit vectors, so that products are cosines."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROWS = 256  # of a matrix of similarities that are computed at once

Vectors = NDArray[np.float32]

# Shape suffixes: N texts or queries, M documents, R rows of a part, D hidden.


def document_ranks(queries_ND: Vectors, documents_MD: Vectors, own_N: NDArray[np.int64]) -> list[int]:
    """The rank of each query's own document among all documents, from 1. own_N: its number.

    Of documents that are equally similar, all have the last of their ranks, so that a model that gives all texts the
    same vector finds nothing.
    """
    ranks: list[int] = []
    for start in range(0, len(queries_ND), _ROWS):
        similarity_RM = queries_ND[start : start + _ROWS] @ documents_MD.T
        own_R1 = np.take_along_axis(similarity_RM, own_N[start : start + _ROWS, None], axis=1)
        ranks += (similarity_RM >= own_R1).sum(axis=1).tolist()
    return ranks


def ndcg(ranks: Sequence[int], cutoff: int = 10) -> float:
    """Normalized discounted cumulative gain of the first documents of a query (Järvelin and Kekäläinen 2002).

    ranks: of all its relevant documents, which have the same gain.
    """
    ideal = range(1, min(len(ranks), cutoff) + 1)
    return _discounted([rank for rank in ranks if rank <= cutoff]) / _discounted(ideal)


def _discounted(ranks: Sequence[int]) -> float:
    return float((1 / np.log2(1 + np.asarray(ranks, dtype=float))).sum())


def potentials(vectors_ND: Vectors) -> NDArray[np.float64]:
    """N, the mean of exp(−2 ‖x − y‖²) over the other vectors y of a vector x.

    The logarithm of their mean is the uniformity of Wang and Isola (2020), https://arxiv.org/abs/2005.10242: 0 if all
    vectors are equal, down to −4 in the limit of vectors spread over the sphere.
    """
    if len(vectors_ND) < 2:
        return np.ones(len(vectors_ND))
    sums = [
        np.exp(-4 * (1 - vectors_ND[start : start + _ROWS] @ vectors_ND.T)).sum(axis=1, dtype=np.float64)
        for start in range(0, len(vectors_ND), _ROWS)
    ]
    return np.asarray((np.concatenate(sums) - 1) / (len(vectors_ND) - 1))  # a vector's own distance is 0
