import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from pretrain.config import OptimizerConfig
from pretrain.training.optimizers import build_optimizer, parameter_groups


def tiny(model_type: str) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(model_type, vocab_size=50, pad_token_id=0)
    for name, size in sizes.items():
        setattr(config, name, size)
    return AutoModelForMaskedLM.from_config(config)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "modernbert", "mpnet"])
def test_every_parameter_is_in_one_group_and_only_weights_decay(model_type: str) -> None:
    """Catches parameters that are never trained or trained twice (tied ones), and decay on biases and norms."""
    model = tiny(model_type)
    decay, rest = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for parameter in (*decay["params"], *rest["params"])]
    assert len(grouped) == len(set(grouped)) == len(names)
    assert set(grouped) == set(names)
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    for parameter in decay["params"]:
        assert parameter.dim() == 2
        name = names[id(parameter)].lower()
        assert not name.endswith("bias"), name
        assert "norm" not in name, name
    for parameter in rest["params"]:
        name = names[id(parameter)].lower()
        assert name.endswith("bias") or "norm" in name, name


def test_frozen_weights_of_norms_do_not_decay_whatever_their_shape() -> None:
    """Catches a rule by dimension alone."""

    class MatrixNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 3))

    decay, rest = parameter_groups(torch.nn.Sequential(torch.nn.Linear(3, 3), MatrixNorm()), 0.1)
    assert [parameter.shape for parameter in decay["params"]] == [(3, 3)]
    assert len(rest["params"]) == 2


def test_the_update_is_that_of_adamw() -> None:
    """Catches betas, eps or decay that do not reach the optimizer: one step, by the paper's formula."""
    layer = torch.nn.Linear(2, 1, dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    gradients = {name: torch.full_like(parameter, 0.3) for name, parameter in layer.named_parameters()}
    config = OptimizerConfig(lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), eps=0.5)
    optimizer = build_optimizer(config, layer)
    for _ in range(2):
        for name, parameter in layer.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        expected, first, second = before[name], torch.zeros(()), torch.zeros(())
        for step in (1, 2):
            first = 0.8 * first + 0.2 * gradients[name]
            second = 0.9 * second + 0.1 * gradients[name] ** 2
            expected = expected * (1 - 0.01 * (0.2 if name == "weight" else 0.0))
            expected = expected - 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 0.5)
        torch.testing.assert_close(parameter.detach(), expected)
