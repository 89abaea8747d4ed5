import pytest
import torch
from torch import nn

from experiment.models.dropout import ProductDropout, fast_dropout, use_fast_dropout


@pytest.fixture(params=["bytes", "products"])
def dropout(request):
    """On a CPU, and in compiled code on a GPU."""
    return {"bytes": fast_dropout, "products": ProductDropout.apply}[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_share_and_expectation(dropout, dtype, probability):
    """Catches a wrong share of zeros, a wrong scale, and correlation between elements that share a word."""
    torch.manual_seed(0)
    values = dropout(torch.ones(1000, 1000, dtype=dtype), probability).float()
    assert (values == 0).float().mean().item() == pytest.approx(probability, abs=0.003)
    assert values.mean().item() == pytest.approx(1.0, abs=0.004)
    zeros = (values == 0).float().flatten()
    for distance in (1, 2, 4, 7, 8):
        together = (zeros[distance:] * zeros[:-distance]).mean().item()
        assert together == pytest.approx(zeros.mean().item() ** 2, abs=0.002)


def test_rows_and_columns_are_dropped_independently():
    """Catches masks that repeat in rows or columns: their correlations vary as those of random bits do."""
    torch.manual_seed(0)
    kept = (ProductDropout.apply(torch.ones(768, 768), 0.1) > 0).double()
    masks = (kept - 0.9) / 0.3
    for rows in (masks, masks.T):
        products = (rows @ rows.T)[*torch.triu_indices(768, 768, 1)] / 768**0.5
        assert products.var().item() == pytest.approx(1, abs=0.05)
        assert products.abs().max() < 7
    mirrored = (masks * masks.T)[*torch.triu_indices(768, 768, 1)]
    assert abs(mirrored.mean()) * len(mirrored) ** 0.5 < 4  # rows and columns have different numbers


def test_gradient_is_that_of_the_mask(dropout):
    """Catches a backward pass with another mask or scale than the forward pass."""
    values = torch.randn(37, 5, requires_grad=True)
    dropped = dropout(values, 0.3)
    dropped.backward(torch.full_like(values, 2.0))
    assert torch.allclose(values.grad, 2.0 * dropped.detach() / values.detach())


def test_the_seed_determines_the_mask(dropout):
    """Catches a generator other than torch's, which a resumed run could not restore."""
    torch.manual_seed(3)
    first, second = dropout(torch.ones(100), 0.5), dropout(torch.ones(100), 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(100), 0.5), first)
    assert not torch.equal(first, second)


def test_layers_are_switched_and_evaluation_drops_nothing():
    """Catches a layer that still uses torch's kernel, and dropout during evaluation."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    names = list(model.state_dict())
    use_fast_dropout(model)
    assert list(model.state_dict()) == names
    ones = torch.ones(64, 4)
    torch.manual_seed(1)
    through_model = model[1](ones)
    torch.manual_seed(1)
    assert torch.equal(through_model, fast_dropout(ones, 0.5))
    model.eval()
    assert torch.equal(model[1](ones), ones)
