"""The norm of a gradient."""

import math

import pytest
import torch

from pretrain.engine.zero_optimizers import sum_of_squares


@pytest.mark.parametrize("sizes", [(20_000_000,), (12_000_001, 7_999_999), (0, 20_000_000)])
def test_the_norm_does_not_depend_on_how_the_gradient_is_divided(sizes: tuple[int, ...]) -> None:
    """Catches squares that are added up in fp32: of large tensors they are too small, so clipping depends on the
    layout."""
    gradient = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    found = math.sqrt(sum_of_squares(gradient.split(sizes)).item())
    assert found == pytest.approx(gradient.double().norm().item(), rel=1e-7)
