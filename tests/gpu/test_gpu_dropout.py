"""Dropout in compiled code on a GPU, by products of numbers of rows and columns."""

import pytest
import torch
from compiling import compiled
from torch import Tensor

from experiment.models.dropout import fast_dropout

PROBABILITY = 0.1


@compiled
def dropped(values: Tensor) -> Tensor:
    return fast_dropout(values, PROBABILITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_dropout(dtype: torch.dtype) -> None:
    """Catches a wrong share or scale, masks that repeat in rows, that do not follow the seed, or that differ in the
    backward pass."""
    values = torch.ones(1000, 768, device="cuda", dtype=dtype, requires_grad=True)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(dropped(values))
    first, again, other = found
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = (first != 0).float()
    assert kept.mean().item() == pytest.approx(1 - PROBABILITY, abs=0.003)
    assert first.max().item() == pytest.approx(1 / (1 - PROBABILITY), rel=1e-2)
    assert float((torch.corrcoef(kept[:64]).abs() - torch.eye(64, device="cuda")).max()) < 0.25
    (gradient,) = torch.autograd.grad(first, values, torch.ones_like(first))
    assert torch.equal(gradient, first)
