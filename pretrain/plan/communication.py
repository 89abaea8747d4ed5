"""The bytes that each rank sends per step.

A ring moves (w - 1) / w of a tensor past each of w ranks to gather or to scatter it, and twice that to reduce it for
all (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). A ring over several machines crosses the network of each
machine once, so the same bytes pass between machines, whatever the number of ranks on each.
"""

from pretrain.engine.deepspeed_settings import uses_zero1_optimizer
from pretrain.plan.memory import MemorySettings
from pretrain.plan.parameters import ParameterCounts

_FP32 = 4  # gradients are reduced in fp32 at every precision


def sent_per_step(counts: ParameterCounts, settings: MemorySettings, microbatches: int) -> float:
    """Bytes per rank and step."""
    around_ring = (settings.ranks - 1) / settings.ranks
    gradients, weights = _FP32 * counts.total * around_ring, settings.weight_bytes * counts.total * around_ring
    match settings.zero_stage:
        case 0:
            return 2 * gradients
        case 1 if uses_zero1_optimizer(settings.zero_stage, settings.offload):
            return gradients + weights
        case 1:
            return 2 * gradients + weights
        case 2:  # reduces after each microbatch
            return 2 * gradients * microbatches + weights
        case _:
            return (gradients + _gathers(counts, settings) * weights) * microbatches


def _gathers(counts: ParameterCounts, settings: MemorySettings) -> int:
    """How often ZeRO 3 gathers the weights for a microbatch: once if all stay until the backward pass."""
    return 1 if 2 * counts.total <= settings.max_reuse_distance else 2
