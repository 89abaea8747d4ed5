"""The norm of a gradient, and clipping."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.zero_step import Zero1Optimizer, sum_of_squares, unscale_and_clip


def test_the_norm_does_not_depend_on_how_the_gradient_is_divided() -> None:
    """Catches squares that are added up in fp32: of large tensors they are too small, so clipping depends on the
    layout."""
    gradient = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    expected = gradient.double().norm().item()
    for sizes in ((20_000_000,), (12_000_001, 7_999_999), (0, 20_000_000)):
        found = math.sqrt(sum_of_squares(gradient.split(sizes)).item())
        assert found == pytest.approx(expected, rel=1e-7), sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_a_gradient_in_16_bit(dtype: torch.dtype) -> None:
    """Catches a norm that is rounded to 16 bit, and one above 65,504 that is taken for an overflow in fp16."""
    gradient = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(1000).to(dtype)
    found = math.sqrt(sum_of_squares([gradient]).item())
    assert found == pytest.approx(gradient.double().norm().item(), rel=1e-5)


CLIPPED = pytest.mark.parametrize(("norm", "limit", "expected"), [(0.5, 1.0, 0.5), (2.0, 1.0, 1.0), (2.0, 0.0, 2.0)])


@CLIPPED
def test_a_scaled_gradient_is_clipped_by_its_unscaled_norm(norm: float, limit: float, expected: float) -> None:
    """Catches gradients of fp16 that are below the limit and are enlarged to it, and a limit of 0 that clips."""
    gradient = 128.0 * norm * torch.tensor([0.6, 0.8])
    unscale_and_clip([gradient], norm, limit, scale=128.0)
    assert gradient.norm().item() == pytest.approx(expected, rel=1e-5)


@CLIPPED
def test_a_device_clips_as_the_host_does(
    monkeypatch: pytest.MonkeyPatch, norm: float, limit: float, expected: float
) -> None:
    """Catches gradients below the limit that are enlarged to it, which AdamW hardly shows."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    adamw = SimpleNamespace(grad_scale=torch.ones(()))  # by which a fused AdamW divides gradients
    optimizer: Any = SimpleNamespace(
        _partitions=[norm * torch.tensor([0.6, 0.8])],
        clip_grad=limit,
        optimizer=adamw,
        _update_weights=lambda _: None,
    )
    Zero1Optimizer.update_within(optimizer, math.inf)
    assert norm / adamw.grad_scale.item() == pytest.approx(expected, rel=1e-5)
