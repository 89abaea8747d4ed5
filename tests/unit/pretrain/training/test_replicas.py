import pytest
import torch

from pretrain.training.replicas import _hash, first_difference


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        ([[1, 2], [1, 2], [1, 2]], None),
        ([[1, 2], [1, 3], [1, 2]], "rank 1 differs from the others in b"),
        ([[5, 9], [1, 3], [1, 2]], "rank 0 differs from the others in a"),
        ([[1, 2], [1, 3], [1, 2], [1, 4], [1, 2]], "ranks 1 and 3 differ from the others in b"),
        ([[1, 2], [1, 3]], "ranks 0 and 1 differ from each other in b"),
        ([[1], [2], [1], [2]], "ranks 0, 1, 2 and 3 differ from each other in a"),
    ],
)
def test_first_difference_names_the_minority(by_rank: list[list[int]], message: str | None) -> None:
    """Catches a message that blames the majority, or one of two ranks, or names a later difference."""
    assert first_difference({"a": 0, "b": 0}, by_rank) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hashes_depend_on_every_bit_and_its_place(dtype: torch.dtype) -> None:
    """Catches sums, which do not change when two rows are exchanged or two signs flip."""
    weights = torch.arange(12, dtype=torch.float32).view(3, 4).to(dtype)
    exchanged, negative = weights[[1, 0, 2]], -weights
    assert _hash(weights) == _hash(weights.clone())
    assert len({_hash(tensor) for tensor in (weights, exchanged, negative, torch.zeros_like(weights))}) == 4
    assert _hash(torch.tensor(1.0, dtype=dtype)) != _hash(torch.tensor(2.0, dtype=dtype))
