import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching.sequences import split_documents


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(1, 60))
def test_splitting_loses_nothing_and_balances(documents, capacity):
    """Catches lost or doubled tokens, sequences that are too long, and one-token tails."""
    lengths = split_documents(np.array(documents, dtype=np.int64), capacity)
    taken = 0
    for document in documents:
        parts = -(-document // capacity)
        chunk = lengths[taken : taken + parts]
        assert chunk.sum() == document
        assert chunk.max() <= capacity
        assert chunk.max() - chunk.min() <= 1
        taken += parts
    assert taken == len(lengths)


@pytest.mark.parametrize(("length", "expected"), [(10, [10]), (11, [6, 5]), (20, [10, 10]), (21, [7, 7, 7])])
def test_splitting_examples(length, expected):
    """Catches a change of the rule, which would change the stream of every existing run."""
    assert split_documents(np.array([length]), 10).tolist() == expected
