"""GELU after a layer with a bias, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.world import World
from rank_pool import RankPool

pytest.importorskip("triton")


def compare(_: World) -> None:
    from pretrain.modeling.bias_gelu import bias_gelu

    torch.manual_seed(0)
    inputs = torch.randn(2, 300, 16).half()  # more rows than one program computes, and not a multiple of a block
    weight, bias = torch.randn(150, 16).half(), torch.randn(150).half()
    upstream = torch.randn(2, 300, 150).half()
    results = []
    for function, dtype in ((bias_gelu, torch.half), (lambda *leaves: F.gelu(F.linear(*leaves)), torch.double)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (inputs, weight, bias)]
        output = function(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < 2e-3


def test_output_and_gradients(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches rows or columns that are left out of a sum, and another derivative than GELU's."""
    interpreting_pools[1].run(compare)


def check_operator(_: World) -> None:
    from pretrain.modeling import bias_gelu as module

    torch.library.opcheck(module._backward, (torch.randn(40, 20).half(), torch.randn(40, 20).half()))


def test_operator_can_be_compiled(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches shapes that differ in compiled code."""
    interpreting_pools[1].run(check_operator)
