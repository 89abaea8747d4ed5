"""Runs in which the loss of some steps is poisoned, so that their batches are bad."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from experiment.errors import AgreedFailureError
from fp16 import fp16_supported
from pretrain.world import World
from runs import Tree, pretrain_case, run_config


class Poison(NamedTuple):
    """What is done to the loss of a step on one rank."""

    factor: float = 1.0  # applied to the loss, or to its gradient only
    in_loss: bool = True
    added: float = 0.0  # to the loss, without an effect on its gradient


def runs_by_policy(folder: Path, corpus: Path, ds_config: str, steps: int) -> dict[str, Tree]:
    """Configs of runs that differ in `health.policy`, each in a folder of that name."""
    return {
        policy: run_config(
            folder / policy,
            corpus,
            ds_config,
            run__log_every=3,
            schedule__steps=steps,
            checkpoint__every_steps=2,
            health__policy=policy,
        )
        for policy in ("skip", "rewind", "stop")
    }


def poisoned_case(
    world: World,
    tree: Mapping[str, Any],
    poisons: Mapping[int, Poison],
    stop_after: int | None = None,
    data_worker: bool = False,
) -> str:
    """A run whose last rank is poisoned in certain steps. Returns the outcome, or the message of AgreedFailureError.

    A gradient can be a spike from the fourth step on; limits are 4 consecutive bad steps and 3 rewinds.
    """
    import pretrain.run
    from pretrain.engine.engine import Engine
    from pretrain.modeling.masked_lm import MaskedLanguageModel
    from pretrain.training import health

    here: list[Poison] = []

    class Poisoned(MaskedLanguageModel):
        def forward(self, *microbatch: torch.Tensor) -> Any:
            found = super().forward(*microbatch)
            for factor, in_loss, added in here if self.training else []:
                if in_loss:
                    found = found._replace(loss_sum=found.loss_sum * factor + added)
                else:
                    found.loss_sum.register_hook(lambda gradient, factor=factor: gradient * factor)
            return found

    def accumulate(self: Engine, microbatch: Any, global_masked: int, step: int, number: int) -> Any:
        here[:] = [poisons[step + 1]] if step + 1 in poisons and world.rank == world.size - 1 else []
        return original(self, microbatch, global_masked, step, number)

    with pytest.MonkeyPatch.context() as patch, fp16_supported():
        original = Engine.accumulate
        patch.setattr(Engine, "accumulate", accumulate)
        patch.setattr(pretrain.run, "MaskedLanguageModel", Poisoned)
        for name, limit in (("MIN_NORMS", 3), ("MAX_CONSECUTIVE", 4), ("MAX_REWINDS", 3)):
            patch.setattr(health, name, limit)
        try:
            return pretrain_case(world, tree, stop_after, data_worker=data_worker)
        except AgreedFailureError as error:
            return str(error)
