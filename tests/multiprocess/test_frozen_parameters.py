"""Which updates are made, and of what: the veto by the gradient's norm, and parameters that are frozen at first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from experiment.checkpoints import checkpoint_path, read_state
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, TINY, Tree, build_engine, logged, microbatch, pretrain_case, run_config, saved_tensors

FROZEN = ("embeddings", "layer.0")


def soak(*layouts: Any) -> list[Any]:
    return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.soak) for x in layouts]


def veto_case(world: World, tree: Tree, folder: Path, limits: list[float]) -> list[tuple[bool, float]]:
    """One step for each limit, on gradients that are the same but for the weights; then a save."""
    from experiment.checkpoints import Retention
    from pretrain.training.checkpoint_io import save_checkpoint

    engine, _ = build_engine(world, tree)
    results = []
    for step, limit in enumerate(limits):
        engine.begin_step(step, 0.01)
        engine.accumulate(microbatch(), 6.0, 0, 0)
        results.append(tuple(engine.step(limit)))
    save_checkpoint(engine, folder, 1, {}, lambda _, hf: hf.mkdir(), Retention(9))
    engine.close()
    return results


@pytest.mark.parametrize(
    "ds_config",
    [
        "fp32_zero0",
        "fp32_zero2",
        "bf16_zero1",
        "bf16_zero3",
        *soak("fp32_zero1", "fp32_zero3", "bf16_zero2", "fp32_zero2_cpu_offload", "fp32_zero3_cpu_offload"),
    ],
)
def test_an_update_over_the_limit_leaves_no_trace(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a vetoed update that decays weights, moves moments or step counters, or leaves its gradient behind; and a
    limit that is compared with the clipped norm."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, optimizer__grad_clip=1e-3)
    free = float("inf")
    (vetoed, *_) = pools[2].run(veto_case, tree, tmp_path / "vetoed", [free, 0.002, free])
    (without, *_) = pools[2].run(veto_case, tree, tmp_path / "without", [free, free])
    assert [applied for applied, _ in vetoed] == [True, False, True]
    assert vetoed[1][1] == vetoed[2][1] > 0.002
    assert [vetoed[0], vetoed[2]] == without
    left, right = (saved_tensors(checkpoint_path(tmp_path / which, 1)) for which in ("vetoed", "without"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def is_frozen(key: str) -> bool:
    return any(f".{item}." in key for item in FROZEN)


def gradient_norm(kept: dict[str, Tensor], keys: list[str]) -> float:
    """After a first step without clipping: Adam's first moment is then the gradient times 0.1."""
    return float(torch.cat([kept[key] for key in keys]).double().norm()) / (1 - 0.9)


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [
        (2, "fp32_zero0"),
        (2, "fp32_zero2"),
        (2, "fp32_zero3"),
        (3, "bf16_zero1"),
        *soak((3, "fp32_zero1"), (1, "bf16_zero3"), (2, "bf16_zero2_cpu_offload"), (2, "fp32_zero3_cpu_offload")),
    ],
)
def test_frozen_parameters_are_left_out_until_they_thaw(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str
) -> None:
    """Catches decay, moments or step counters of frozen parameters, their part in the norm, an endless frost, and
    moments after it that are those of a parameter trained from the start."""
    changes = {
        "model__config": TINY | NO_DROPOUT,
        "optimizer__grad_clip": 0.0,
        "optimizer__weight_decay": 0.5,
        "schedule__steps": 4,
        "checkpoint__every_steps": 1,
    }
    trees = {
        "free": run_config(tmp_path / "free", wordpiece_corpus, ds_config, **changes | {"schedule__steps": 1}),
        "frozen": run_config(tmp_path / "frozen", wordpiece_corpus, ds_config, **changes),
    }
    trees["frozen"]["model"] |= {"freeze": list(FROZEN), "freeze_steps": 2}
    trees["frozen"]["schedule"]["warmup_steps"] = 0
    for tree in trees.values():
        pools[world_size].run(pretrain_case, tree)
    free = saved_tensors(checkpoint_path(tmp_path / "free" / "checkpoints", 1))
    frozen = [saved_tensors(checkpoint_path(tmp_path / "frozen" / "checkpoints", step)) for step in (1, 2, 3, 4)]
    cold = [key for key in frozen[0] if is_frozen(key)]
    warm = [key for key in free if not is_frozen(key) and key.endswith("/exp_avg")]

    assert cold
    assert all(key.endswith("/fp32") for key in cold), "a frozen parameter has optimizer state"
    assert all(torch.equal(frozen[0][key], frozen[1][key]) for key in cold)
    assert not any(torch.equal(frozen[1][key], frozen[2][key]) for key in cold if "padding" not in key)
    assert {float(value) for key, value in frozen[3].items() if is_frozen(key) and key.endswith("/step")} == {2.0}
    assert {float(value) for key, value in frozen[3].items() if not is_frozen(key) and key.endswith("/step")} == {4.0}

    relative = 1e-5 if ds_config.startswith("fp32") else 1e-2
    norms = logged(tmp_path / "frozen", "grad_norm")
    assert norms[0] == pytest.approx(gradient_norm(free, warm), rel=relative)
    assert norms[0] < 0.95 * logged(tmp_path / "free", "grad_norm")[0], "the frozen part is too small to show"
    first = gradient_norm(frozen[2], [key for key in frozen[2] if is_frozen(key) and key.endswith("/exp_avg")])
    usual = [
        len(read_state(checkpoint_path(tmp_path / "frozen" / "checkpoints", step))["progress"]["norms"])
        for step in (1, 2, 3)
    ]
    assert usual == [1, 0, 1], "the norm of what was frozen is taken for a spike"
    assert 0.1 * norms[2] < first < norms[2], "the first moment after the thaw is one gradient, weighted as a first"


@pytest.mark.parametrize(
    ("world_size", "ds_config", "optimizer"),
    [
        (2, "fp32_zero1", "adamw"),
        (2, "fp32_zero3", "lamb"),
        *soak((2, "fp32_zero0", "adamw"), (2, "bf16_zero3", "stableadamw"), (3, "bf16_zero2", "lamb")),
    ],
)
def test_a_run_that_is_resumed_before_the_thaw_is_the_unbroken_one(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str, optimizer: str
) -> None:
    """Catches a thaw that is counted from the resume, moments or counters that a resume gives to what is frozen, and an
    optimizer that cannot tell a frozen group from one that stage 3 has emptied."""
    trees = {name: run_config(tmp_path / name, wordpiece_corpus, ds_config) for name in ("unbroken", "broken")}
    for tree in trees.values():
        tree["model"] |= {"freeze": list(FROZEN), "freeze_steps": 4}
        tree["optimizer"] |= {"layer_decay": 0.7, "name": optimizer}
    pools[world_size].run(pretrain_case, trees["unbroken"])
    for steps in (3, 1):
        assert pools[world_size].run(pretrain_case, trees["broken"], steps)[0] == "stopped"
    pools[world_size].run(pretrain_case, trees["broken"])
    one, other = (saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 6)) for name in trees)
    assert {float(value) for key, value in one.items() if is_frozen(key) and key.endswith("/step")} == {2.0}
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert logged(tmp_path / "broken", "grad_norm") == logged(tmp_path / "unbroken", "grad_norm")


def rewind_case(world: World, tree: Tree, folder: Path) -> None:
    """A frozen step, saved as 1; one after the thaw, as 2; then back to 1, saved as 3, and the same step, as 4."""
    from experiment.checkpoints import Retention
    from pretrain.engine.partitions import base_optimizer
    from pretrain.training.checkpoint_io import load_checkpoint, save_checkpoint

    engine, _ = build_engine(world, tree)

    def step(number: int) -> None:
        engine.begin_step(number, 0.01)
        engine.accumulate(microbatch(), 6.0, number, 0)
        engine.step()

    def save(name: int) -> None:
        save_checkpoint(engine, folder, name, {}, lambda _, hf: hf.mkdir(), Retention(9))

    step(0)
    save(1)
    step(1)
    save(2)
    states = base_optimizer(engine._deepspeed).state.values()
    moments = [StorageWeakRef(state["exp_avg"].untyped_storage()) for state in states]
    assert moments
    load_checkpoint(engine, checkpoint_path(folder, 1))
    assert all(moment.expired() for moment in moments)
    save(3)
    step(1)
    save(4)
    engine.close()


@pytest.mark.parametrize("ds_config", ["fp32_zero0", "bf16_zero1", "fp32_zero3", *soak("fp32_zero2")])
def test_a_used_engine_goes_back_to_a_checkpoint(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches moments, counters and averages of the future that survive a rewind to before a thaw, or fill memory."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config)
    tree["model"] |= {"freeze": list(FROZEN), "freeze_steps": 1, "ema_decay": 0.9}
    pools[2].run(rewind_case, tree, tmp_path)
    first, second, back, again = (saved_tensors(checkpoint_path(tmp_path, name)) for name in (1, 2, 3, 4))
    assert any(is_frozen(key) and key.endswith("/exp_avg") for key in second)
    for one, other in ((first, back), (second, again)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def step_or_load_case(world: World, tree: Tree, folder: Path, source: Path | None) -> int:
    """A step, or `source` in its place, then a save as 1. Returns how many parameter groups there are."""
    from experiment.checkpoints import Retention
    from pretrain.engine.partitions import base_optimizer
    from pretrain.training.checkpoint_io import load_checkpoint, save_checkpoint

    engine, _ = build_engine(world, tree)
    if source is None:
        engine.begin_step(0, 0.01)
        engine.accumulate(microbatch(), 6.0, 0, 0)
        engine.step()
    else:
        load_checkpoint(engine, source)
    save_checkpoint(engine, folder, 1, {}, lambda _, hf: hf.mkdir(), Retention(9))
    groups = len(base_optimizer(engine._deepspeed).param_groups)
    engine.close()
    return groups


@pytest.mark.parametrize("ds_config", ["fp32_zero1", *soak("fp32_zero3", "bf16_zero2")])
def test_layer_decay_may_change_on_resume(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches moments and counters that stay with a parameter group instead of going with the parameter."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config)
    made, moved = tmp_path / "made", tmp_path / "moved"
    assert pools[2].run(step_or_load_case, tree, made, None) == [2, 2]
    tree["optimizer"] |= {"layer_decay": 0.8}
    assert pools[2].run(step_or_load_case, tree, moved, checkpoint_path(made, 1)) == [8, 8]
    one, other = saved_tensors(checkpoint_path(made, 1)), saved_tensors(checkpoint_path(moved, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
