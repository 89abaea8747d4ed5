from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching.batch_sizes import BatchSizes


@given(st.integers(1, 300), st.integers(0, 60), st.integers(0, 80))
def test_batches_grow_linearly(sequences, warmup, first_step):
    """Catches gaps, overlaps, empty batches and ones that are too large, wherever in the warmup a stage starts."""
    sizes = BatchSizes(sequences, warmup, first_step)
    starts = [sizes.start(step) for step in range(first_step, first_step + 100)]
    assert starts[0] == 0
    for step, (start, after) in enumerate(pairwise(starts), first_step):
        grown = min(1.0, (step + 1) / (warmup + 1)) * sequences
        assert 1 <= after - start <= sequences
        assert abs(after - start - grown) <= 1
        if step >= warmup:
            assert after - start == sequences


@given(st.integers(1, 300), st.integers(0, 60), st.integers(0, 80), st.integers(1, 10_000))
def test_the_end_is_the_first_step_that_reaches_all_positions(sequences, warmup, first_step, positions):
    """Catches a run limited by epochs or tokens that is one batch too short or too long."""
    sizes = BatchSizes(sequences, warmup, first_step)
    end = sizes.end(positions)
    assert sizes.start(end - 1) < positions <= sizes.start(end)


def test_a_mistyped_length_has_an_end() -> None:
    """Catches an OverflowError instead of a plan that shows the mistake."""
    sizes = BatchSizes(8, warmup_steps=3)
    end = sizes.end(10**21)
    assert sizes.start(end - 1) < 10**21 <= sizes.start(end)
