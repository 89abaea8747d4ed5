"""Gradients of microbatches are accumulated in fp32, whatever the precision of the model."""

from pathlib import Path

import pytest
import torch

from experiment.run_files.checkpoints import checkpoint_path
from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, SHALLOW, Tree, build_engine, microbatch, run_config, sampled, save_engine, saved_tensors

MANY = 24  # a sum of so many equal gradients is off by 0.1 % or more in bf16 and fp16, which have 8 and 11 bits
PRESETS = [
    f"{precision}_zero{kind}"
    for precision in ("bf16", "fp16")
    for kind in ("1", "2", "3", "2_cpu_offload", "3_cpu_offload")
]
SMALL = SHALLOW | NO_DROPOUT


def accumulation_case(world: World, tree: Tree, folder: Path, microbatches: int) -> None:
    """One update from many equal microbatches."""
    with fp16_supported():
        engine, _ = build_engine(world, tree)
    engine.begin_step(0, 0.0)
    for number in range(microbatches):
        engine.accumulate(microbatch(), 6 * MANY, 0, number)
    assert engine.step().wait().applied
    save_engine(engine, folder, 1)
    engine.close()


@pytest.mark.parametrize(
    "ds_config",
    sampled(PRESETS, ["bf16_zero1", "bf16_zero3"]),
)
def test_gradients_are_accumulated_in_fp32(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches 16-bit accumulation, which rounds each sum: of 400 equal gradients, 256 would be left."""
    first: dict[int, torch.Tensor] = {}
    for count in (1, MANY):
        folder = tmp_path / str(count)
        tree = run_config(folder, wordpiece_corpus, ds_config, model__config=SMALL)
        tree["optimizer"] |= {"grad_clip": 0.0}
        pools[1].run(accumulation_case, tree, folder / "checkpoints", count)
        kept = saved_tensors(checkpoint_path(folder / "checkpoints", 1))
        first[count] = torch.cat([kept[key].double() for key in kept if key.endswith("/exp_avg")])
    expected = MANY * first[1]
    assert float((first[MANY] - expected).norm() / expected.norm()) < 1e-5
