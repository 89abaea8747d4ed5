import copy

import pytest
import torch
from torch import Tensor, nn

from experiment.models import fp32_sums
from experiment.models.fp32_sums import use_fp32_sums

TOKENS, COLUMNS = (5, 1640), 24  # 8,200 in all


def gradients_of(module: nn.Module, inputs: Tensor, upstream: Tensor) -> list[Tensor]:
    """Of the parameters, in fp32, and of the inputs if they are not ids."""
    inputs = inputs.clone().requires_grad_(inputs.is_floating_point())
    module.zero_grad()
    module(inputs).backward(upstream)
    tensors = [*module.parameters(), *([inputs] if inputs.requires_grad else [])]
    return [tensor.grad.float() for tensor in tensors if tensor.grad is not None]


def errors(module: nn.Module, inputs: Tensor, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Relative errors of gradients in 16 bit, of torch's module and of ours. The module is changed."""
    upstream = (torch.randn(*TOKENS, COLUMNS) + 0.1).to(dtype)
    module.to(dtype)
    theirs, ours = nn.Sequential(module), nn.Sequential(copy.deepcopy(module))
    use_fp32_sums(ours)
    assert torch.equal(theirs(inputs), ours(inputs))
    in_fp32 = copy.deepcopy(theirs).float()
    values = inputs.float() if inputs.is_floating_point() else inputs
    expected = gradients_of(in_fp32, values, upstream.float())
    found = [gradients_of(model, inputs, upstream) for model in (theirs, ours)]
    theirs_and_ours = [
        [float((a - b).norm() / b.norm()) for a, b in zip(each, expected, strict=True)] for each in found
    ]
    return theirs_and_ours[0], theirs_and_ours[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_norms(monkeypatch: pytest.MonkeyPatch, bias: bool, dtype: torch.dtype) -> None:
    """Catches sums that are rounded after each addition, a chunk that is lost or counted twice, and the gradients of
    weight and bias exchanged."""
    torch.manual_seed(0)
    monkeypatch.setattr(fp32_sums, "_CHUNK", 300 * COLUMNS)  # does not divide the tokens
    norm = nn.LayerNorm(COLUMNS, bias=bias)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs, ours = errors(norm, torch.randn(*TOKENS, COLUMNS).to(dtype), dtype)
    rounding = torch.finfo(dtype).eps
    assert max(ours) < rounding < max(theirs)
    assert len(ours) == 2 + bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, 0])
def test_gradients_of_embeddings(padding: int | None, dtype: torch.dtype) -> None:
    """Catches sums that are rounded after each addition, a gradient of padding, and a row that gets another's."""
    torch.manual_seed(0)
    ids = torch.randint(0, 3, TOKENS) * 2  # the other rows of the table have no tokens
    theirs, ours = errors(nn.Embedding(7, COLUMNS, padding_idx=padding), ids, dtype)
    assert max(ours) < torch.finfo(dtype).eps < max(theirs)


def test_other_modules_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tables whose options would be lost, and slower modules on a GPU."""
    modules = nn.ModuleList(
        [nn.Embedding(5, 4, sparse=True), nn.Embedding(5, 4, max_norm=1.0), nn.Embedding(5, 4, scale_grad_by_freq=True)]
    )
    plain = nn.ModuleList([nn.Embedding(5, 4), nn.LayerNorm(4)])
    use_fp32_sums(modules)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        use_fp32_sums(plain)
    assert {type(module) for module in [*modules, *plain]} == {nn.Embedding, nn.LayerNorm}
    use_fp32_sums(plain)
    assert {type(module) for module in plain}.isdisjoint({nn.Embedding, nn.LayerNorm})


def test_frozen_parameters_get_no_gradient() -> None:
    """Catches gradients that are computed for frozen parameters."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)).bfloat16()
    model[:2].requires_grad_(False)
    use_fp32_sums(model)
    model(torch.tensor([1, 2])).sum().backward()
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, True, False, False]


def test_compiled_layers_are_one_graph() -> None:
    """Catches a graph break, and a loop over chunks in compiled code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)).bfloat16()
    use_fp32_sums(model)
    ids = torch.randint(0, 5, (7,))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(ids), model(ids))
