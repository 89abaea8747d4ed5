"""GELU in compiled code on a GPU: the function, and where it is used. `tests/gpu/test_gpu_gelu.py` compiles it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling import fast_gelu as module
from pretrain.modeling.fast_gelu import Gelu, fast_gelu, use_fast_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_derivatives_are_those_of_torch(dtype: torch.dtype) -> None:
    """Catches a wrong coefficient, and a tail of the wrong sign."""
    values = torch.linspace(-9, 9, 10_000).to(dtype).requires_grad_()
    exact = values.detach().double().requires_grad_()
    upstream = torch.linspace(-1, 2, 10_000).to(dtype)
    output, expected = Gelu.apply(values), F.gelu(exact)
    (gradient,) = torch.autograd.grad(output, values, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert (output.dtype, gradient.dtype) == (dtype, dtype)
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=3e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=3e-6)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_models_call_it(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches activations that the model keeps elsewhere. On a CPU, it is torch's."""
    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=100
    )
    config.pad_token_id = 0
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids = torch.arange(1, 9)[None]
    expected = model(ids).logits
    use_fast_gelu(model)
    assert torch.equal(model(ids).logits, expected)
    values = torch.randn(3, requires_grad=True)
    assert fast_gelu(values).grad_fn.name() == "GeluBackward0"
    called = []
    monkeypatch.setattr(module.F, "gelu", lambda values: called.append(values) or values)
    model(ids)
    assert len(called) >= 2
