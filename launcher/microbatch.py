"""Smaller microbatches, for devices without enough memory: the global batch and the results stay the same. Pure."""

from pretrain.config import PretrainConfig


def max_halvings(config: PretrainConfig) -> int:
    """How often `halved_microbatch` changes a config: until a microbatch is one sequence."""
    halvings = 0
    while halved_microbatch(config, halvings + 1) != halved_microbatch(config, halvings):
        halvings += 1
    return halvings


def halved_microbatch(config: PretrainConfig, times: int) -> PretrainConfig:
    """The config with microbatches halved so often, in all stages, but of at least one sequence."""
    if times == 0:
        return config
    batch = config.batch.model_copy(
        update={"microbatch_tokens": _halved(config.batch.microbatch_tokens, config.batch.max_seq_length, times)}
    )
    stages = tuple(
        stage.model_copy(
            update={
                "microbatch_tokens": _halved(
                    stage.microbatch_tokens or config.batch.microbatch_tokens,
                    stage.max_seq_length or config.batch.max_seq_length,
                    times,
                )
            }
        )
        for stage in config.schedule.stages
    )
    schedule = config.schedule.model_copy(update={"stages": stages})
    return config.model_copy(update={"batch": batch, "schedule": schedule})


def _halved(tokens: int, max_seq_length: int, times: int) -> int:
    return max(max_seq_length, tokens >> times)
