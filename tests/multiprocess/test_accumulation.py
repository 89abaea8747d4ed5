"""Gradients of many microbatches are summed in fp32, whatever the model computes in."""

from pathlib import Path

import pytest
import torch

from experiment.checkpoints import Retention, checkpoint_path
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, TINY, Tree, build_engine, everything, microbatch, settings
from test_fp16 import fp16_supported

MANY = 400  # more than a bf16 has steps between a number and its double, so that a sum in bf16 would come to a halt
SMALL = TINY | NO_DROPOUT | {"num_hidden_layers": 1}


def summing_case(world: World, tree: Tree, folder: Path, microbatches: int) -> None:
    """One update from so many equal microbatches."""
    from pretrain.training.checkpoint_io import save_checkpoint

    with fp16_supported():
        engine, _ = build_engine(world, tree)
    engine.begin_step(0, 0.0)
    for number in range(microbatches):
        engine.accumulate(microbatch(), 6 * MANY, 0, number)
    assert engine.step().applied
    save_checkpoint(engine, folder, 1, {}, lambda _, hf: hf.mkdir(), Retention(1))
    engine.close()


@pytest.mark.parametrize(
    "ds_config",
    [
        pytest.param(
            f"{precision}_zero{kind}", marks=() if f"{precision}{kind}" in ("bf161", "bf163") else pytest.mark.soak
        )
        for precision in ("bf16", "fp16")
        for kind in ("1", "2", "3", "2_cpu_offload", "3_cpu_offload")
    ],
)
def test_many_microbatches_add_up_exactly(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches sums in 16 bit, in which what comes late is rounded away: 400 equal summands would make 256."""
    first: dict[int, torch.Tensor] = {}
    for count in (1, MANY):
        folder = tmp_path / str(count)
        tree = settings(folder, wordpiece_corpus, ds_config, model__config=SMALL)
        tree["optimizer"] |= {"grad_clip": 0.0}
        pools[1].run(summing_case, tree, folder / "checkpoints", count)
        kept = everything(checkpoint_path(folder / "checkpoints", 1))
        first[count] = torch.cat([kept[key].double() for key in kept if key.endswith("/exp_avg")])
    expected = MANY * first[1]
    assert float((first[MANY] - expected).norm() / expected.norm()) < 1e-5
