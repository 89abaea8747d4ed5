from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.errors import UserError
from pretrain.corpus.build_plan import HELDOUT, MAIN, Part, Sampling


@given(
    documents=st.integers(1, 200),
    holdout=st.integers(0, 220),
    limit=st.none() | st.integers(1, 220),
    seed=st.integers(0, 99),
)
def test_counts_are_exact(documents: int, holdout: int, limit: int | None, seed: int) -> None:
    """Catches one document too many or too few."""
    sampling = Sampling(seed, limit, holdout or None)
    if holdout >= documents:
        with pytest.raises(UserError):
            next(sampling.assign(documents))
        return
    parts = list(sampling.assign(documents))
    assert len(parts) == documents
    assert parts.count(HELDOUT) == holdout
    assert parts.count(MAIN) == min(documents - holdout, limit or documents)


def test_documents_are_equally_likely() -> None:
    """Catches sampling that prefers a part of the source (chi-squared, 99.99 % point for 19 degrees of freedom)."""
    drawn = np.zeros(20)
    for seed in range(2000):
        parts: Iterator[Part | None] = Sampling(seed, 5, 4).assign(20)
        drawn += np.array([part == MAIN for part in parts])
    assert ((drawn - 500) ** 2 / (500 * 0.75)).sum() < 52
