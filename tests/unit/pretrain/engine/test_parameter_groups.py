from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.engine.parameter_groups import build_optimizer, parameter_groups


def tiny_model(model_type: str) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(model_type, vocab_size=50, pad_token_id=0)
    for name, size in sizes.items():
        setattr(config, name, size)
    return AutoModelForMaskedLM.from_config(config)


def build_groups(model: PreTrainedModel, freeze: tuple[str, ...] = (), **optimizer: Any) -> list[dict[str, Any]]:
    frozen = ModelConfig(config={"model_type": "bert"}, freeze=freeze, freeze_steps=7 if freeze else 0)
    return parameter_groups(model, OptimizerConfig(**optimizer), frozen)


def names_in_group(model: PreTrainedModel, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "modernbert", "mpnet"])
def test_every_parameter_is_in_one_group_and_only_weights_decay(model_type: str) -> None:
    """Catches parameters in no group or in two (tied ones), and weight decay on biases and norms."""
    model = tiny_model(model_type)
    decay, rest = build_groups(model, weight_decay=0.1)
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


def test_weights_of_norms_do_not_decay() -> None:
    """Catches a rule that goes by the number of dimensions only."""

    class MatrixNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 3))

    model = tiny_model("bert")
    model.add_module("extra", MatrixNorm())
    assert "extra.weight" in names_in_group(model, build_groups(model)[-1])


def test_layer_decay_lowers_the_rate_of_lower_layers() -> None:
    """Catches a layer-wise decay in the wrong direction, or off by one layer."""
    model = tiny_model("bert")
    scales = {
        name: group["lr_scale"]
        for group in build_groups(model, layer_decay=0.5)
        for name in names_in_group(model, group)
    }
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.25
    assert scales["bert.encoder.layer.0.output.dense.weight"] == 0.5
    assert scales["cls.predictions.transform.dense.weight"] == 1.0


def test_frozen_parameters_have_their_own_groups() -> None:
    """Catches a frozen parameter in a trained group, and the reverse."""
    model = tiny_model("bert")
    frozen = {group["frozen_until"]: set() for group in build_groups(model, freeze=("embeddings", "layer.0.attention"))}
    for group in build_groups(model, freeze=("embeddings", "layer.0.attention")):
        frozen[group["frozen_until"]] |= names_in_group(model, group)
    assert frozen.keys() == {0, 7}
    assert all("embeddings" in name or "layer.0.attention" in name for name in frozen[7])
    assert not any("embeddings" in name or "layer.0.attention" in name for name in frozen[0])


def test_vetoed_updates_and_frozen_groups_change_nothing() -> None:
    """Catches decay, moments or a step count of frozen parameters or in a vetoed update, and groups that are lost."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [weight], "lr": 0.1, "frozen": False} for weight in weights]
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), groups)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.allowed = lambda: False
    optimizer.step()
    assert not optimizer.state
    optimizer.allowed = lambda: True
    optimizer.param_groups[0]["frozen"] = True
    optimizer.step()
    assert torch.equal(weights[0], torch.ones(3))
    assert not torch.equal(weights[1], torch.ones(3))
    assert set(optimizer.state) == {weights[1]}
    assert len(optimizer.param_groups) == 2
