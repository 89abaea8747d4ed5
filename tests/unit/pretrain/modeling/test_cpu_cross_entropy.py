import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiment.models import fast_linear
from pretrain.batching.batch import IGNORED
from pretrain.modeling import cpu_cross_entropy
from pretrain.modeling.cpu_cross_entropy import linear_cross_entropy

ROWS, HIDDEN, VOCABULARY = 50, 24, 301
SCALE = 0.37  # of the loss


def inputs(dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, HIDDEN, generator=draw).mul_(factor).to(dtype) for size in (ROWS, VOCABULARY))
    bias = torch.randn(VOCABULARY, generator=draw).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
    labels[[0, 7, -1]] = IGNORED
    return hidden, weight, bias, labels


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("openblas", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_of_a_chunk", [1, 7, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    rows_of_a_chunk: int,
    with_bias: bool,
    openblas: bool,
) -> None:
    """Catches rows between two chunks that are lost, ignored rows that count, and a gradient that is not scaled."""
    monkeypatch.setattr(cpu_cross_entropy, "_CHUNK_LOGITS", rows_of_a_chunk * VOCABULARY)
    monkeypatch.setattr(fast_linear, "_NO_AVX512", openblas)
    *values, labels = inputs(dtype)
    values = [value.requires_grad_() for value in values[: 3 if with_bias else 2]]
    exact = [value.detach().double().requires_grad_() for value in values]
    padded = [None] * (3 - len(values))
    expected = reference(*exact, *padded, labels)
    found = linear_cross_entropy(*values, *padded, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, other in zip(
        torch.autograd.grad(found * SCALE, values), torch.autograd.grad(expected * SCALE, exact), strict=True
    ):
        assert gradient.dtype == dtype
        assert float((gradient.double() - other).norm() / other.norm()) < tolerance


def test_improbable_labels_have_finite_losses() -> None:
    """Catches the logarithm of a probability that is rounded to 0: an infinite loss, which would skip the batch."""
    hidden, weight, bias, labels = inputs(torch.float32, factor=10.0)
    expected = reference(hidden.double(), weight.double(), bias.double(), labels)
    assert expected / ROWS > 200
    assert linear_cross_entropy(hidden, weight, bias, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_that_are_not_finite_are_reported() -> None:
    """Catches a loss that hides weights which are not finite."""
    hidden, weight, bias, labels = inputs(torch.float32)
    hidden[3] = torch.nan
    assert torch.isnan(linear_cross_entropy(hidden, weight, bias, labels))


def test_frozen_inputs_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches products that are computed for a frozen head."""
    products = []
    compute = cpu_cross_entropy._weight_gradient
    monkeypatch.setattr(cpu_cross_entropy, "_weight_gradient", lambda *args: products.append(args) or compute(*args))
    for frozen in (True, False):
        hidden, weight, bias, labels = inputs(torch.float32)
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        linear_cross_entropy(hidden, weight, bias, labels).backward()
        assert hidden.grad is not None
        assert (products == []) == frozen


def test_the_scale_of_the_loss_is_not_rounded() -> None:
    """Catches a scale that is rounded to bf16, by up to 0.4 %, before gradients are multiplied by it."""
    *values, labels = inputs(torch.bfloat16)
    for value in values:
        value.requires_grad_()
    assert torch.tensor(SCALE).bfloat16().item() != pytest.approx(SCALE, rel=2e-3)
    scaled = torch.autograd.grad(linear_cross_entropy(*values, labels) * SCALE, values)
    for gradient, once in zip(scaled, torch.autograd.grad(linear_cross_entropy(*values, labels), values), strict=True):
        factor = (gradient.double() * once.double()).sum() / once.double().square().sum()
        assert float(factor) == pytest.approx(SCALE, rel=5e-4)
