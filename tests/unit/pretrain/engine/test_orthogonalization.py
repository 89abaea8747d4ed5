"""Muon's orthogonalization and its options."""

from typing import Any

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from pretrain.engine.muon import Muon, assign, orthogonalization_dtype, orthogonalization_flops, orthogonalize
from pretrain.optimizer_config import MuonConfig, OptimizerConfig


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 70)])
def test_orthogonalization_equals_that_of_torch(shape: tuple[int, int]) -> None:
    """Catches other coefficients, and a tall matrix that is not transposed."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert torch.equal(orthogonalize(matrix.bfloat16()), expected)
    torch.testing.assert_close(orthogonalize(matrix), expected.float(), rtol=0, atol=0.02)


def test_the_gradient_of_an_unused_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 70)])
def test_flops_are_those_of_its_products(shape: tuple[int, int]) -> None:
    """Catches a wrong balance of work over ranks."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape))
    assert counter.get_total_flops() == orthogonalization_flops(*shape)


@pytest.mark.parametrize(
    ("precision", "chosen", "expected"),
    [("bf16", None, "bfloat16"), ("fp16", None, "float32"), ("fp32", None, "float32"), ("bf16", "fp32", "float32")],
)
def test_precision(precision: Any, chosen: Any, expected: str) -> None:
    assert orthogonalization_dtype(MuonConfig(precision=chosen), precision) == getattr(torch, expected)


def test_matrices_are_spread_over_ranks_by_their_cost() -> None:
    """Catches a rank that orthogonalizes everything, and slices that are sent although their rank could do the work."""
    costs = {"a": 4.0, "b": 3.0, "c": 3.0, "d": 2.0}
    held = {"a": [0, 9], "b": [9, 0], "c": [5, 4], "d": [0, 9]}
    assert assign(costs, held) == {"a": 1, "b": 0, "c": 0, "d": 1}


@pytest.mark.parametrize(
    ("adjust_lr", "shape", "expected"),
    [
        ("match_rms_adamw", (16, 64), 0.2 * 8),
        ("match_rms_adamw", (64, 16), 0.2 * 8),
        ("original", (64, 16), 2.0),
        ("original", (16, 64), 1.0),
    ],
)
def test_scale_of_updates(adjust_lr: Any, shape: tuple[int, int], expected: float) -> None:
    """Catches rows taken for columns."""
    options = MuonConfig(adjust_lr=adjust_lr)
    muon = Muon([{"params": []}], lr=1e-3, betas=(0.9, 0.98), eps=1e-6, options=options, precision="fp32")
    assert muon.scale(*shape) == pytest.approx(expected)


@pytest.mark.parametrize(("nesterov", "expected"), [(True, [1.68, 0.192]), (False, [1.2, 0.48])])
def test_momentum(nesterov: bool, expected: list[float]) -> None:
    """Catches a momentum, or a choice of its kind, that has no effect."""
    options = MuonConfig(momentum=0.4, nesterov=nesterov)
    muon = Muon([{"params": []}], lr=1e-3, betas=(0.9, 0.98), eps=1e-6, options=options, precision="fp32")
    weights = torch.nn.Parameter(torch.zeros(1))
    found = []
    for gradient in (2.0, 0.0):
        weights.grad = torch.tensor([gradient])
        found.append(muon._advance(weights).item())
    assert found == pytest.approx(expected)


def test_options_of_muon_without_muon_are_rejected() -> None:
    """Catches a learning rate that has no effect."""
    with pytest.raises(ValueError, match="'muon' belongs to the optimizer 'muon', but 'name' is 'adamw'"):
        OptimizerConfig(muon=MuonConfig(lr=0.02))
