"""Ranks whose copies of the weights differ: `health.compare_every`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.errors import AgreedFailureError
from pretrain.world import World
from rank_pool import RankPool
from runs import TINY, pretrain_case, run_config, soak


def flipped_case(world: World, tree: Mapping[str, Any], flipped_rank: int) -> str:
    """A run in which a bit of one rank's weights flips after step 2. Returns the message of AgreedFailureError."""
    from pretrain.engine.engine import Engine

    def begin_step(self: Engine, step: int, *others: Any) -> None:
        steps.append(step + 1)
        began(self, step, *others)

    def step(self: Engine, limit: float) -> Any:
        result = stepped(self, limit)
        if steps[-1] == 2 and world.rank == flipped_rank:
            weight = dict(self._deepspeed.module.named_parameters())[
                "model.bert.encoder.layer.1.attention.output.dense.weight"
            ]
            bits = weight.data.view(-1)[7:8].view(torch.uint8)
            bits[0] ^= 1
        return result

    steps: list[int] = []
    began, stepped = Engine.begin_step, Engine.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "begin_step", begin_step)
        patch.setattr(Engine, "step", step)
        try:
            return pretrain_case(world, tree)
        except AgreedFailureError as error:
            return str(error)


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [
        (3, "bf16_zero1"),
        (2, "fp32_zero3"),
        *soak((3, "fp32_zero0"), (3, "fp32_zero2"), (2, "fp32_zero0")),
    ],
)
def test_a_flipped_bit_is_reported(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str
) -> None:
    """Catches silent corruption, a wrong rank in the message, and a comparison that only some ranks reach, so that the
    others hang."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, model__config=TINY, health__compare_every=2)
    messages = pools[world_size].run(flipped_case, tree, 1)
    who = "rank 1 differs from the others" if world_size == 3 else "ranks 0 and 1 differ from each other"
    what = f"step 2: {who} in the weights of bert.encoder.layer.1.attention.output.dense.weight"
    assert all(message.startswith(what) for message in messages)
    assert len(messages) == world_size
