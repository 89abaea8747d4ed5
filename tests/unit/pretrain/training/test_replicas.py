import pytest
import torch

from pretrain.training.replicas import _hash, first_difference


@pytest.mark.parametrize(
    ("by_rank", "said"),
    [
        ([[1, 2], [1, 2], [1, 2]], None),
        ([[1, 2], [1, 3], [1, 2]], "rank 1 differs from the others in b"),
        ([[5, 9], [1, 3], [1, 2]], "rank 0 differs from the others in a"),
        ([[1, 2], [1, 3], [1, 2], [1, 4], [1, 2]], "ranks 1 and 3 differ from the others in b"),
        ([[1, 2], [1, 3]], "ranks 0 and 1 differ from each other in b"),
        ([[1], [2], [1], [2]], "ranks 0, 1, 2 and 3 differ from each other in a"),
    ],
)
def test_the_first_difference_and_who_is_alone_with_it(by_rank: list[list[int]], said: str | None) -> None:
    """Catches a majority that is blamed, one of two ranks that is, and a later difference named for the first."""
    assert first_difference({"a": 0, "b": 0}, by_rank) == said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hash_sees_every_bit_and_where_it_is(dtype: torch.dtype) -> None:
    """Catches sums, in which a sign that flips twice or two exchanged rows do not show."""
    weights = torch.arange(12, dtype=torch.float32).view(3, 4).to(dtype)
    exchanged, negative = weights[[1, 0, 2]], -weights
    assert _hash(weights) == _hash(weights.clone())
    assert len({_hash(tensor) for tensor in (weights, exchanged, negative, torch.zeros_like(weights))}) == 4
    assert _hash(torch.tensor(1.0, dtype=dtype)) != _hash(torch.tensor(2.0, dtype=dtype))
