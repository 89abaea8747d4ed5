"""Sums on GPUs: the gradients of token types, and what ranks agree on in a step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.modeling.small_embeddings import OneHotEmbedding
from pretrain.training.step_agreement import DeviceSums
from pretrain.world import World


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_token_types_are_exact_sums(dtype: torch.dtype) -> None:
    """Catches sums over 65,536 slots that are rounded to 16 bit on the way."""
    torch.manual_seed(0)
    ids = (torch.rand(1, 65_536, device="cuda") < 0.01).long()
    upstream = torch.randn(1, 65_536, 768, device="cuda").to(dtype)
    weight = torch.zeros(2, 768, device="cuda", dtype=dtype, requires_grad=True)
    exact = torch.zeros(2, 768, device="cuda", dtype=torch.float64, requires_grad=True)
    OneHotEmbedding.apply(ids, weight).backward(upstream)  # type: ignore[no-untyped-call]
    F.embedding(ids, exact).backward(upstream.double())
    assert float((weight.grad - exact.grad).norm() / exact.grad.norm()) < (1e-5 if dtype == torch.float32 else 5e-3)


def sums_case(world: World) -> list[list[int]]:
    """Two agreements in flight while the GPU computes."""
    sums = DeviceSums(torch.device("cuda"), lambda: None)
    matrix = torch.randn(4096, 4096, device="cuda")
    first = sums.start_all_reduce_sum([world.rank, 1, 2**40])
    for _ in range(20):
        matrix = torch.tanh(matrix @ matrix)
    second = sums.start_all_reduce_sum([3] * 1024)
    return [first(), first(), second()]


def test_ranks_sum_whole_numbers_on_their_gpus(gpus: Any) -> None:
    """Catches numbers that are read before they are complete, and large ones that are rounded."""
    results = gpus.run(sums_case)
    count = len(results)
    expected = [sum(range(count)), count, count * 2**40]
    assert results == [[expected, expected, [3 * count] * 1024]] * count
