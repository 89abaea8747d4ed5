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
