from collections.abc import Callable

import numpy as np
import pytest
import torch

from pretrain.batching.counter_rng import random_bits
from pretrain.training.replicas import _hash_on_device, first_difference, hash_bits


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


def on_device(tensor: torch.Tensor) -> int:
    return int(_hash_on_device(tensor))


def on_host(tensor: torch.Tensor) -> int:
    return int(hash_bits(tensor))


HASHES = pytest.mark.parametrize("hash_of", [on_host, on_device])


@HASHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hashes_depend_on_every_bit_and_its_place(hash_of: Callable[[torch.Tensor], int], dtype: torch.dtype) -> None:
    """Catches sums, which do not change when two rows are exchanged or two signs flip."""
    weights = torch.arange(12, dtype=torch.float32).view(3, 4).to(dtype)
    exchanged, negative = weights[[1, 0, 2]], -weights
    assert hash_of(weights) == hash_of(weights.clone())
    assert len({hash_of(tensor) for tensor in (weights, exchanged, negative, torch.zeros_like(weights))}) == 4
    assert hash_of(torch.tensor(1.0, dtype=dtype)) != hash_of(torch.tensor(2.0, dtype=dtype))


@HASHES
def test_hashes_notice_each_flipped_bit_and_exchange(
    hash_of: Callable[[torch.Tensor], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches bits that do not count, positions that count from the start of each block, and pairs that cancel out."""
    monkeypatch.setattr("pretrain.training.replicas._HASHED_AT_ONCE", 8)
    weights = torch.randn(20, generator=torch.Generator().manual_seed(0))
    bits = weights.view(torch.int32)
    changed = []
    for place in range(20):
        for bit in range(32):
            flipped = bits.clone()
            flipped[place] ^= 1 << bit if bit < 31 else -(1 << 31)
            changed.append(flipped)
        for other in range(place):
            exchanged = bits.clone()
            exchanged[[place, other]] = bits[[other, place]]
            changed.append(exchanged)
    assert len({hash_of(tensor.view(torch.float32)) for tensor in (*changed, bits)}) == len(changed) + 1


def test_the_hash_on_the_device_is_splitmix64() -> None:
    """Catches shifts that copy the sign: the mixing would lose bits."""
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    states = weights.view(torch.int32).long().numpy().view(np.uint64)
    assert on_device(weights) % 2**64 == int(random_bits(states, np.arange(1000)).sum())
