"""Optimizers compared with direct transcriptions of their papers, in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretrain.engine.optimizers import AdamW, GatedOptimizer, Lamb, PerParameterOptimizer, StableAdamW
from pretrain.engine.partitions import Fragment

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


RULES: list[tuple[type[GatedOptimizer], Rule]] = [(AdamW, adamw), (Lamb, lamb), (StableAdamW, stableadamw)]


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
    return {"params": [tensor], "weight_decay": DECAY if decays else 0.0, "decays": decays, "frozen": False}


@pytest.mark.parametrize(("rule", "transcription"), RULES)
def test_updates_are_those_of_the_paper(rule: type[GatedOptimizer], transcription: Rule) -> None:
    """Catches betas, eps or weight decay that have no effect, a misplaced bias correction or norm, and trust ratios
    over several parameters."""
    parameters = {name: (torch.nn.Parameter(torch.tensor(x)), g, decays) for name, x, g, decays in problem()}
    groups = [parameter_group(parameter, decays) for parameter, _, decays in parameters.values()]
    optimizer = rule(groups, lr=LR, betas=BETAS, eps=EPS)  # type: ignore[call-arg,arg-type]
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


@pytest.mark.parametrize(("rule", "transcription"), RULES[1:])
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
