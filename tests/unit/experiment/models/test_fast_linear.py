import copy

import pytest
import torch
from torch import nn

from experiment.models.fast_linear import use_fast_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """Catches a transposed gradient, a lost bias, and a shape that is not that of the layer."""
    plain = nn.Sequential(nn.Linear(5, 4, bias=bias)).to(dtype)
    fast = copy.deepcopy(plain)
    use_fast_linear(fast)
    values = torch.randn(shape, dtype=dtype)
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    outputs = [model(values) for model, values in zip((plain, fast), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*(values.grad for values in inputs))
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert plain.state_dict().keys() == fast.state_dict().keys()


def test_frozen_layers_get_no_gradient() -> None:
    """Catches work for gradients that nobody wants, and a gradient for a frozen weight."""
    model = nn.Sequential(nn.Linear(5, 4))
    model.requires_grad_(False)
    use_fast_linear(model)
    values = torch.randn(3, 5, requires_grad=True)
    model(values).sum().backward()
    assert values.grad is not None
    assert model[0].weight.grad is None


def test_autocast_still_decides_the_precision() -> None:
    """Catches fp32 products in a run in bf16."""
    model = nn.Sequential(nn.Linear(5, 4))
    use_fast_linear(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(3, 5)).dtype == torch.bfloat16
