"""Gradients and updates at ZeRO 1 and 3."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.engine.zero_step import Zero1Optimizer, sum_over_ranks
from pretrain.world import World
from rank_pool import ForkServer, RankPool
from runs import TINY, Tree, build_engine, events_without_timing, logged, microbatch, pretrain_case, run_config


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


@pytest.fixture
def new_ranks(fork_server: ForkServer) -> Iterator[RankPool]:
    """Two ranks that no other test uses: DeepSpeed keeps the groups of `zero_hpz_partition_size` for later engines."""
    pool = RankPool(fork_server, 2)
    yield pool
    pool.close()


def test_weights_that_zero3_keeps_twice_are_updated(
    pools: dict[int, RankPool], new_ranks: RankPool, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches biases and norms of the step before, and initial weights after a resume: ZeRO 3 takes them from the
    second copy that `zero_hpz_partition_size` keeps."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    once, twice = (
        run_config(tmp_path / name, wordpiece_corpus, "fp32_zero3", schedule__steps=4) for name in ("once", "twice")
    )
    twice["engine"] = {"ds_config": str(tmp_path / "ds.json")}
    assert pools[2].run(pretrain_case, once) == ["done"] * 2
    assert new_ranks.run(pretrain_case, twice, 2) == ["stopped"] * 2
    assert new_ranks.run(pretrain_case, twice) == ["done"] * 2
    assert logged(tmp_path / "twice") == pytest.approx(logged(tmp_path / "once"), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_zero3_releases_after_use(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, ranks: int
) -> None:
    """Catches weights that are used in an evaluation after they were released, or are not those of the last update.
    ZeRO 3 keeps weights below a threshold, and so all of a tiny model."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    changes = {"schedule__steps": 4, "corpus__eval": {"held": str(heldout_corpus)}, "evaluation__every_steps": 2}
    kept, released = (
        run_config(tmp_path / name, wordpiece_corpus, "fp32_zero3", model__config=TINY, **changes)
        for name in ("kept", "released")
    )
    released["engine"] = {"ds_config": str(tmp_path / "ds.json")}
    assert pools[ranks].run(pretrain_case, kept) == ["done"] * ranks
    assert pools[ranks].run(pretrain_case, released, 3) == ["stopped"] * ranks
    assert pools[ranks].run(pretrain_case, released) == ["done"] * ranks
    found, expected = (events_without_timing(tmp_path / name) for name in ("released", "kept"))
    # Gathered weights are parts of one tensor, so kernels may round differently: memory is aligned differently.
    assert found == [
        {key: value if value is None else pytest.approx(value, rel=1e-5) for key, value in event.items()}
        for event in expected
    ]
