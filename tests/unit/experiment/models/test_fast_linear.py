import copy
from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from experiment.models import fast_linear
from experiment.models.fast_linear import input_gradient, multiply, use_fast_linear, uses_openblas, weight_gradient


@pytest.fixture
def _threads() -> Iterator[None]:
    """Restores the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fast_linear._openblas_with_one_thread.cache_clear()


@pytest.fixture(params=[False, True], ids=["oneDNN", "OpenBLAS"])
def _library(request: pytest.FixtureRequest, _threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_linear, "_NO_AVX512", request.param)
    torch.set_num_threads(1)
    assert uses_openblas(torch.float32) is request.param


@pytest.mark.usefixtures("_library")
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


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_operands_in_any_layout(rows: int) -> None:
    """Catches memory that is read as if it were contiguous."""
    values, weight = torch.randn(5, 2 * rows).t()[::2], torch.randn(4, 10)[:, ::2]
    gradient = torch.randn(4).expand(rows, 4)
    torch.testing.assert_close(multiply(values, weight), values @ weight.t())
    torch.testing.assert_close(input_gradient(gradient, weight), gradient @ weight)
    torch.testing.assert_close(weight_gradient(gradient, values), gradient.t() @ values)


@pytest.mark.usefixtures("_library")
@pytest.mark.filterwarnings("error")
def test_overflow_is_infinite_without_a_warning() -> None:
    """Catches NumPy's warning in a run that diverges, beside its own message."""
    large = torch.full((3, 5), 1e30)
    assert multiply(large, large).isinf().all()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("avx512", "threads", "library", "dtype", "expected"),
    [
        (False, 1, "openblas", torch.float32, True),
        (True, 1, "openblas", torch.float32, False),
        (False, 2, "openblas", torch.float32, False),
        (False, 1, "openblas", torch.bfloat16, False),
        (False, 1, "another", torch.float32, False),
    ],
)
def test_openblas_is_for_one_thread_without_avx512(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, threads: int, library: str, dtype: torch.dtype, expected: bool
) -> None:
    """Catches threads of OpenBLAS beside those of torch, and NumPy with another library."""
    monkeypatch.setattr(fast_linear, "_NO_AVX512", not avx512)
    fast_linear._openblas_with_one_thread.cache_clear()
    if library != "openblas":
        others = ThreadpoolController().select(user_api="openmp")
        monkeypatch.setattr(fast_linear, "ThreadpoolController", lambda: others)
    openblas = ThreadpoolController().select(internal_api="openblas")
    openblas.limit(limits=2)
    torch.set_num_threads(threads)
    assert uses_openblas(dtype) is expected
    if expected:
        assert {found["num_threads"] for found in openblas.info()} == {1}


@pytest.mark.usefixtures("_library")
def test_compiled_layers_are_one_graph() -> None:
    """Catches a graph break at the choice of the library, and other values in compiled code."""
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    use_fast_linear(model)
    values = torch.randn(7, 5)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(values)
    torch.testing.assert_close(found, model(values))
    gradients = [
        torch.autograd.grad(result.square().sum(), list(model.parameters())) for result in (found, model(values))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("_library")
def test_a_second_derivative_is_refused() -> None:
    """Catches one that lacks the terms of this layer: its products are not differentiable."""
    model = nn.Sequential(nn.Linear(5, 4))
    use_fast_linear(model)
    values = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(values).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
