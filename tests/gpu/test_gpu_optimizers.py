"""Updates on a GPU in fp32 follow those on the CPU in float64, which unit tests compare with the papers."""

import pytest
import torch
from torch import Tensor

from pretrain.engine.optimizers import AdamW, GatedOptimizer, Lamb, PerParameterOptimizer, StableAdamW
from pretrain.engine.partitions import Fragment

SHAPES = ((512, 768), (768,), (30_522, 16), (1,))
STEPS = 5


def updated(rule: type[GatedOptimizer], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Parameters after some steps of given gradients, copied to the CPU in float64."""
    draw = torch.Generator().manual_seed(4)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    parameters = [torch.nn.Parameter(start.to(device, dtype)) for start in starts]
    groups = [
        {"params": [one], "weight_decay": 0.1 * (one.dim() > 1), "decays": one.dim() > 1, "frozen": False}
        for one in parameters
    ]
    optimizer = rule(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)  # type: ignore[call-arg]
    if isinstance(optimizer, PerParameterOptimizer):
        names = [str(number) for number in range(len(parameters))]
        whole = [
            Fragment(name, tuple(one.shape), 0, one.data.view(-1), one, 0)
            for name, one in zip(names, parameters, strict=True)
        ]
        optimizer.attach(whole, names, lambda sums: sums)
    for step in range(STEPS):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.grad = (gradient * (20.0 if step == 3 else 0.1)).to(device, dtype)
        optimizer.step()
    return [parameter.detach().cpu().double() for parameter in parameters]


@pytest.mark.parametrize("rule", [AdamW, Lamb, StableAdamW])
def test_updates_follow_those_on_the_cpu(rule: type[GatedOptimizer]) -> None:
    """Catches norms over the wrong slices, scalars on another device, and sums that are rounded to fp32."""
    found, expected = updated(rule, "cuda", torch.float32), updated(rule, "cpu", torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vetoed", [False, True])
def test_the_kernel_of_adamw_decides_on_an_update(vetoed: bool) -> None:
    """Catches a vetoed update that changes weights, moments or the step counter, and a gradient that is not clipped."""
    start, gradient = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    clipped, expected = (
        AdamW([{"params": [one], "weight_decay": 0.1, "frozen": False}], lr=0.01, betas=(0.9, 0.98), eps=1e-6)
        for one in parameters
    )
    for step in range(3):
        clipped.found_inf = torch.tensor(float(vetoed and step == 1), device="cuda")
        clipped.grad_scale = torch.tensor(4.0, device="cuda")
        parameters[0].grad = torch.full_like(gradient, torch.nan) if vetoed and step == 1 else gradient.clone()
        clipped.step()
        if not (vetoed and step == 1):
            parameters[1].grad = gradient / 4.0
            expected.step()
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-6, atol=1e-7)
    found, wanted = (optimizer.state[one] for optimizer, one in zip((clipped, expected), parameters, strict=True))
    assert found["step"].item() == wanted["step"].item() == 3 - vetoed
    torch.testing.assert_close(found["exp_avg_sq"], wanted["exp_avg_sq"], rtol=1e-6, atol=1e-9)
