"""Optimizers compared with direct transcriptions of their papers, in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from pretrain.config import ModelConfig
from pretrain.engine.optimizers import Lamb, PerParameterOptimizer, StableAdamW
from pretrain.engine.parameter_groups import build_optimizer, parameter_groups
from pretrain.engine.partitions import Fragment
from pretrain.modeling.structure import hidden_matrices
from pretrain.optimizer_config import MuonConfig, OptimizerConfig

LR, BETAS, EPS, DECAY, STEPS = 0.05, (0.8, 0.95), 1e-3, 0.3, 6
Vector = NDArray[np.float64]
Rule = Callable[[Vector, list[Vector], bool], Vector]


def adamw(x: Vector, gradients: list[Vector], decays: bool) -> Vector:
    """Loshchilov and Hutter 2019, algorithm 2."""
    (beta1, beta2), m, v = BETAS, np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        x = x - LR * (m_hat / (np.sqrt(v_hat) + EPS) + (DECAY * x if decays else 0.0))
    return x


def lamb(x: Vector, gradients: list[Vector], decays: bool) -> Vector:
    """You et al. 2020, algorithm 2; biases and norms have neither weight decay nor a trust ratio."""
    (beta1, beta2), m, v = BETAS, np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        r = m_hat / (np.sqrt(v_hat) + EPS)
        if decays:
            r = r + DECAY * x
            if np.linalg.norm(x) > 0 and np.linalg.norm(r) > 0:
                r = np.linalg.norm(x) / np.linalg.norm(r) * r
        x = x - LR * r
    return x


def stableadamw(theta: Vector, gradients: list[Vector], decays: bool) -> Vector:
    """Wortsman et al. 2023, algorithm 2, where v is the first and u the second moment."""
    v, u = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETAS)
        v = beta1 * v + (1 - beta1) * g
        u = beta2 * u + (1 - beta2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(u, EPS**2)))
        eta = LR / max(1.0, rms)
        theta = theta - (eta * DECAY * theta if decays else 0.0) - eta * v / (np.sqrt(u) + EPS)
    return theta


def problem() -> Iterator[tuple[str, Vector, list[Vector], bool]]:
    """Parameters of very different scale and gradients that jump, so that trust ratios and clipping have an effect."""
    draw = np.random.default_rng(3)
    for name, shape, scale, decays in (
        ("weight", (7, 5), 2.0, True),
        ("small", (3, 11), 0.01, True),
        ("zero", (2, 3), 0.0, True),
        ("bias", (5,), 0.5, False),
        ("unused", (4,), 0.7, True),  # no gradient, but weight decay
    ):
        gradients = [draw.normal(size=shape) * (20.0 if t == 3 else 0.1) for t in range(STEPS)]
        if name == "unused":
            gradients = [np.zeros(shape) for _ in gradients]
        yield name, draw.normal(size=shape) * scale, gradients, decays


def parameter_group(tensor: torch.Tensor, decays: bool) -> dict[str, Any]:
    decay = DECAY if decays else 0.0
    return {"params": [tensor], "weight_decay": decay, "decays": decays, "frozen": False, "matrices": False}


@pytest.mark.parametrize(
    ("name", "transcription"), [("adamw", adamw), ("lamb", lamb), ("stableadamw", stableadamw), ("muon", adamw)]
)
def test_updates_are_those_of_the_paper(name: Any, transcription: Rule) -> None:
    """Catches betas, eps or weight decay that have no effect, a misplaced bias correction or norm, and trust ratios
    over several parameters."""
    parameters = {name: (torch.nn.Parameter(torch.tensor(x)), g, decays) for name, x, g, decays in problem()}
    groups = [parameter_group(parameter, decays) for parameter, _, decays in parameters.values()]
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=LR, betas=BETAS, eps=EPS), groups, "fp32")
    if isinstance(optimizer, PerParameterOptimizer):
        whole = [Fragment(n, tuple(p.shape), 0, p.data.view(-1), p, 0) for n, (p, _, _) in parameters.items()]
        optimizer.attach(whole, list(parameters), lambda sums: sums)
    for step in range(STEPS):
        for parameter, gradients, _ in parameters.values():
            parameter.grad = torch.tensor(gradients[step])
        optimizer.step()
    for name, start, gradients, decays in problem():
        expected = transcription(start, gradients, decays)
        np.testing.assert_allclose(parameters[name][0].detach().numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize(("rule", "transcription"), [(Lamb, lamb), (StableAdamW, stableadamw)])
def test_a_flat_tensor_can_hold_fragments_of_several_parameters(
    rule: type[PerParameterOptimizer], transcription: Rule
) -> None:
    """Catches norms of the flat tensor instead of its parameters, and updates of the padding between them."""
    parts = [(name, x.ravel(), [g.ravel() for g in gradients]) for name, x, gradients, decays in problem() if decays]
    starts = np.cumsum([3] + [x.size + 2 for _, x, _ in parts])
    flat = torch.nn.Parameter(torch.full((int(starts[-1]),), 9.0, dtype=torch.float64))
    slices = []
    for (name, x, _), start in zip(parts, starts, strict=False):
        flat.data[start : start + x.size] = torch.tensor(x)
        slices.append(Fragment(name, (x.size,), 0, flat.data[start : start + x.size], flat, int(start)))
    optimizer = rule([parameter_group(flat, True)], lr=LR, betas=BETAS, eps=EPS)
    optimizer.attach(slices, [name for name, _, _ in parts], lambda sums: sums)
    for step in range(STEPS):
        flat.grad = torch.ones_like(flat)
        for (_, x, gradients), start in zip(parts, starts, strict=False):
            flat.grad[start : start + x.size] = torch.tensor(gradients[step])
        optimizer.step()
    for (name, x, gradients), start in zip(parts, starts, strict=False):
        expected = transcription(x, gradients, True)
        np.testing.assert_allclose(
            flat.detach()[start : start + x.size].numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=name
        )
    assert torch.equal(flat.detach()[:3], torch.full((3,), 9.0, dtype=torch.float64))


def test_stableadamw_clips_in_the_problem_above() -> None:
    """Catches a problem in which clipping has no effect, so that the tests above would not test it."""
    (name, x, gradients, decays), *_ = problem()
    assert name == "weight"
    assert np.abs(stableadamw(x, gradients, decays) - adamw(x, gradients, decays)).max() > 0.01


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


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_frozen_parameters_have_their_own_groups(model_type: str) -> None:
    """Catches a frozen parameter in a trained group, and the reverse, also where a table is named after the decoder."""
    model = tiny_model(model_type)
    saved = model.all_tied_weights_keys
    frozen = {group["frozen_until"]: set() for group in build_groups(model, freeze=("embeddings", "layer.0.attention"))}
    for group in build_groups(model, freeze=("embeddings", "layer.0.attention")):
        frozen[group["frozen_until"]] |= {saved.get(name, name) for name in names_in_group(model, group)}
    assert frozen.keys() == {0, 7}
    assert all("embeddings" in name or "layer.0.attention" in name for name in frozen[7])
    assert not any("embeddings" in name or "layer.0.attention" in name for name in frozen[0])


def test_unused_parameters_do_not_decay() -> None:
    """Catches weights that no gradient reaches, and that shrink."""
    model, unused = tiny_model("bert"), "cls.predictions.transform.dense.weight"
    groups = parameter_groups(model, OptimizerConfig(), ModelConfig(config={"model_type": "bert"}), unused={unused})
    (own,) = [group for group in groups if unused in names_in_group(model, group)]
    assert own["weight_decay"] == 0.0
    assert not own["decays"]


def test_groups_of_muon() -> None:
    """Catches a matrix with two optimizers, one with the other's learning rate, and unused weights that decay."""
    model = tiny_model("bert")
    unused = "cls.predictions.transform.dense.weight"
    config = OptimizerConfig(name="muon", lr=1e-3, muon=MuonConfig(lr=0.02))
    groups = parameter_groups(model, config, ModelConfig(config={"model_type": "bert"}), unused={unused})
    matrices = [group for group in groups if group["matrices"]]
    assert [group["lr_scale"] for group in matrices] == [pytest.approx(20.0)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in matrices[0]["params"]} == {*hidden_matrices(model)} - {unused}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["lr_scale"] for group in groups if not group["matrices"]} == {1.0}


def test_vetoed_updates_and_frozen_groups_change_nothing() -> None:
    """Catches decay, moments or a step count of frozen parameters or in a vetoed update, and groups that are lost."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [weight], "lr": 0.1, "frozen": False} for weight in weights]
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), groups, "fp32")
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
