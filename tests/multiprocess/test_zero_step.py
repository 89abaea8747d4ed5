"""Gradients and updates at ZeRO 1."""

from pathlib import Path

import pytest
import torch

from pretrain.engine.zero_step import Zero1Optimizer, sum_over_ranks
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, build_engine, microbatch, run_config


def sum_case(world: World) -> list[float]:
    """This rank's part of a sum over ranks whose terms are lost if they are added in another order than the ranks'."""
    terms = [1e8, -1e8, 1.0][: world.size]
    whole = torch.full((2 * world.size,), terms[world.rank]) + torch.arange(2 * world.size)
    partition = whole.narrow(0, 2 * world.rank, 2)
    sum_over_ranks(whole, partition)
    return partition.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_sums_its_part_in_the_order_of_the_ranks(pools: dict[int, RankPool], ranks: int) -> None:
    """Catches parts that are swapped between ranks, and sums whose rounding depends on which rank sends first."""
    terms = [torch.tensor(1e8), torch.tensor(-1e8), torch.tensor(1.0)][:ranks]
    expected = sum((term + torch.arange(2 * ranks) for term in terms[1:]), terms[0] + torch.arange(2 * ranks))
    found = pools[ranks].run(sum_case)
    assert [value for part in found for value in part] == expected.tolist()


def unused_case(world: World, tree: Tree) -> list[float]:
    """The gradient norms of a step, and of one in which the embeddings get no gradient."""
    engine, model = build_engine(world, tree)
    assert isinstance(engine._deepspeed.optimizer, Zero1Optimizer)
    norms = []
    for step in range(2):
        engine.begin_step(step, 0.0)
        model.base_model.embeddings.requires_grad_(step == 0)
        engine.accumulate(microbatch(), 6, step, 0)
        norms.append(engine.step().wait().grad_norm)
    engine.close()
    return norms


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_missing_gradient_is_zero(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, precision: str, ranks: int
) -> None:
    """Catches the gradient of an earlier step that is used again for a parameter without one."""
    tree = run_config(tmp_path, wordpiece_corpus, f"{precision}_zero1", optimizer__grad_clip=0.0)
    for used, unused in pools[ranks].run(unused_case, tree):
        assert 0 < unused < 0.9 * used
