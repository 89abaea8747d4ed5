"""Other sizes of the microbatch: halved when memory runs out, and tried by `--autotune`."""

import math
from typing import TypeVar

from experiment.config import Section
from pretrain.config import BatchConfig, PretrainConfig
from pretrain.schedule_config import Stage

S = TypeVar("S", bound=Section)


def max_halvings(config: PretrainConfig) -> int:
    """Return how often halving changes the computation: until a microbatch is one sequence."""
    sizes: tuple[BatchConfig | Stage, ...] = (config.batch, *config.stages)  # evaluations have the size of `batch`
    halvings = 0
    while any(size.microbatch_tokens >> halvings > size.max_seq_length for size in sizes):
        halvings += 1
    return halvings


def max_doublings(config: PretrainConfig, ranks: int) -> int:
    """Return how often doubling changes the computation: until a microbatch holds a rank's share of a global batch."""
    shares = (
        math.ceil(stage.sequences / ranks) * stage.max_seq_length / stage.microbatch_tokens for stage in config.stages
    )
    return max(0, math.ceil(math.log2(max(shares))))


def scaled_microbatch(config: PretrainConfig, doublings: int) -> PretrainConfig:
    """Return the config with microbatches doubled so often, in all stages; with a negative number halved, but of at
    least one sequence."""
    if doublings == 0:
        return config

    def scaled(section: S, sizes: BatchConfig | Stage) -> S:
        tokens = sizes.microbatch_tokens
        tokens = tokens << doublings if doublings > 0 else tokens >> -doublings
        return section.model_copy(update={"microbatch_tokens": max(sizes.max_seq_length, tokens)})

    stages = tuple(map(scaled, config.schedule.stages, config.stages))  # none if the config has none
    schedule = config.schedule.model_copy(update={"stages": stages})
    return config.model_copy(update={"batch": scaled(config.batch, config.batch), "schedule": schedule})
