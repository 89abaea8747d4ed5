"""fp16 with dynamic loss scaling, on a CPU that emulates it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.errors import AgreedFailureError
from experiment.run_files.checkpoints import checkpoint_path, read_state
from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, SHALLOW, Tree, logged, pretrain_case, run_config, sampled, saved_tensors, soak

STAGES = sampled([1, 2, 3], [2])


def fp16_case(
    world: World, tree: Tree, stop_after: int | None = None, poisoned: tuple[tuple[int, int], ...] = ()
) -> str:
    """An fp16 run with infinite gradients at each (step, rank) of `poisoned`. Returns the outcome, or the message of
    AgreedFailureError."""
    from pretrain.engine.engine import Engine

    accumulate = Engine.accumulate

    def with_poison(self: Any, microbatch: Any, global_masked: int, step: int, number: int) -> Any:
        parameter = next(self._deepspeed.module.parameters())
        hook = parameter.register_hook(
            lambda gradient: gradient.fill_(torch.inf) if (step, world.rank) in poisoned and number == 0 else gradient
        )
        try:
            return accumulate(self, microbatch, global_masked, step, number)
        finally:
            hook.remove()

    Engine.accumulate = with_poison  # type: ignore[method-assign]
    try:
        with fp16_supported():
            return pretrain_case(world, tree, stop_after)
    except AgreedFailureError as error:
        return str(error)
    finally:
        Engine.accumulate = accumulate  # type: ignore[method-assign]


def fp16_config(folder: Path, corpus: Path, stage: int, scaling: dict[str, Any], **changes: Any) -> Tree:
    """Config of a run with a preset whose fp16 section is changed by `scaling`."""
    from experiment.files import REPOSITORY

    preset = json.loads((REPOSITORY / "ds_configs" / f"fp16_zero{stage}.json").read_text())
    tree = run_config(folder, corpus, model__config=SHALLOW | NO_DROPOUT, **changes)
    folder.mkdir(exist_ok=True)
    own = folder / "ds.json"
    own.write_text(json.dumps(preset | {"fp16": preset["fp16"] | scaling}))
    tree["engine"] = {"ds_config": str(own)}
    return tree


def relative_difference(folder: Path, reference: Path, step: int, kind: str) -> float:
    """Return how far the tensors of a kind in two runs' checkpoints are apart, as a share of the reference's norm."""
    one, other = (
        torch.cat([kept[key] for key in kept if key.endswith(f"/{kind}")])
        for kept in (saved_tensors(checkpoint_path(each / "checkpoints", step)) for each in (folder, reference))
    )
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def in_fp32(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 steps."""
    folder = tmp_path_factory.mktemp("fp32")
    tree = run_config(folder, wordpiece_corpus, model__config=SHALLOW | NO_DROPOUT, schedule__steps=3)
    pools[2].run(pretrain_case, tree)
    return folder


@pytest.mark.parametrize("stage", [3, *soak(0, 1, 2)])
def test_fp16_follows_fp32(
    pools: dict[int, RankPool], wordpiece_corpus: Path, in_fp32: Path, tmp_path: Path, stage: int
) -> None:
    """Catches gradients that are not unscaled, and a loss scale that is not logged."""
    tree = fp16_config(tmp_path, wordpiece_corpus, stage, {}, schedule__steps=3)
    assert pools[2].run(fp16_case, tree) == ["done"] * 2
    assert logged(tmp_path) == pytest.approx(logged(in_fp32), rel=1e-3)
    # AdamW makes of a gradient of any scale the same update: only the moments show it.
    assert relative_difference(tmp_path, in_fp32, 3, "exp_avg") < 0.02
    assert logged(tmp_path, "loss_scale") == [2.0**16] * 3
    assert logged(tmp_path, "skipped_steps") == logged(tmp_path, "overflows") == [0] * 3
    assert logged(in_fp32, "skipped_steps") == [0] * 3
    assert logged(in_fp32, "overflows") == logged(in_fp32, "loss_scale") == [None] * 3


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_consumes_its_batch_and_only_changes_the_loss_scale(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches a skipped step that changes moments or weights, on the rank that overflowed or another, batches that are
    repeated, and counts that a resume resets."""
    scaling = {"initial_scale_power": 12, "hysteresis": 1}
    tree = fp16_config(tmp_path, wordpiece_corpus, stage, scaling, checkpoint__every_steps=1)
    # In the second batch a gradient is infinite on rank 1, in the fifth on both.
    poisoned = ((1, 1), (4, 0), (4, 1))
    assert pools[2].run(fp16_case, tree, 3, poisoned) == ["stopped"] * 2
    assert pools[2].run(fp16_case, tree, None, poisoned) == ["done"] * 2
    kept = [saved_tensors(checkpoint_path(tmp_path / "checkpoints", step)) for step in range(1, 7)]
    same = [all(torch.equal(before[key], after[key]) for key in after) for before, after in pairwise(kept)]
    assert same == [True, False, False, True, False]
    assert logged(tmp_path, "skipped_steps") == logged(tmp_path, "overflows") == [0, 1, 1, 1, 2, 2]
    assert logged(tmp_path, "loss_scale") == [2.0**12, 2.0**11, 2.0**11, 2.0**11, 2.0**10, 2.0**10]
    assert logged(tmp_path, "grad_norm")[1] in (None, float("inf"))
    tokens = logged(tmp_path, "tokens")
    assert sorted(set(tokens)) == tokens


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_scale_that_is_too_high_falls(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches overflows that are not detected, and skipped steps that delay the schedule."""
    tree = fp16_config(tmp_path, wordpiece_corpus, stage, {"initial_scale_power": 20, "hysteresis": 1})
    assert pools[2].run(fp16_case, tree) == ["done"] * 2
    skipped = logged(tmp_path, "skipped_steps")
    assert 0 < skipped[-1] < 6
    assert skipped == [min(step, skipped[-1]) for step in range(1, 7)]
    assert logged(tmp_path, "loss_scale")[-1] == 2.0 ** (20 - skipped[-1])
    assert logged(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", STAGES)
def test_a_doubled_loss_scale_applies_from_the_next_step(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches DeepSpeed's order, in which a gradient is divided by a scale that has just doubled."""
    trees = {
        name: fp16_config(tmp_path / name, wordpiece_corpus, stage, scaling, optimizer__grad_clip=0.0)
        for name, scaling in {
            "growing": {"initial_scale_power": 8, "loss_scale_window": 1},
            "constant": {"initial_scale_power": 8},
        }.items()
    }
    for tree in trees.values():
        pools[2].run(fp16_case, tree)
    growing, constant = (tmp_path / name for name in trees)
    assert logged(growing, "loss_scale")[-1] >= 2.0**12
    assert logged(growing, "grad_norm") == pytest.approx(logged(constant, "grad_norm"), rel=1e-2)
    for kind in ("exp_avg", "fp32"):
        assert relative_difference(growing, constant, 6, kind) < 0.02


@pytest.mark.parametrize("stage", [3, *soak(2)])
def test_overflows_at_the_smallest_loss_scale_end_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches a run that skips every step endlessly, a trace instead of advice, and ranks that hang."""
    scaling = {"initial_scale_power": 3, "hysteresis": 1, "min_loss_scale": 4}
    tree = fp16_config(tmp_path, wordpiece_corpus, stage, scaling)
    messages = pools[2].run(fp16_case, tree, None, tuple((step, 1) for step in range(1, 6)))
    assert len(set(messages)) == 1
    assert "gradients overflow even at the smallest loss scale, 4 (fp16.min_loss_scale" in messages[0]
    assert "lower optimizer.lr" in messages[0]
    assert "bf16" in messages[0]
    assert logged(tmp_path, "loss_scale") == [8.0, 4.0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_scale_survives_a_resume(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches a resume that resets the scale, its window or its hysteresis."""
    scaling = {"initial_scale_power": 5, "loss_scale_window": 2, "hysteresis": 2}
    poisoned = ((1, 0),)
    for name, parts in {"uninterrupted": [None], "resumed": [2, None]}.items():
        tree = fp16_config(tmp_path / name, wordpiece_corpus, stage, scaling)
        for stop_after in parts:
            pools[2].run(fp16_case, tree, stop_after, poisoned)
    for key in ("loss", "loss_scale", "grad_norm", "skipped_steps"):
        assert logged(tmp_path / "resumed", key) == logged(tmp_path / "uninterrupted", key)
    states = [read_state(checkpoint_path(tmp_path / name / "checkpoints", 6)) for name in ("resumed", "uninterrupted")]
    assert states[0]["loss_scaler"] == states[1]["loss_scaler"]
    assert states[0]["loss_scaler"]["cur_scale"] > 2**5


def test_the_loss_scale_is_not_carried_to_another_precision(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches the constant scale of 1 of another precision in fp16, where small gradients would underflow."""
    changes = {"model__config": SHALLOW | NO_DROPOUT, "schedule__steps": 3}
    for ds_config, outcome in (("bf16_zero2", "stopped"), ("fp16_zero2", "stopped"), ("fp32_zero3", "done")):
        tree = run_config(tmp_path, wordpiece_corpus, ds_config, **changes)
        assert pools[2].run(fp16_case, tree, 1 if outcome == "stopped" else None) == [outcome] * 2
    assert logged(tmp_path, "loss_scale") == [None, 2.0**16, None]
    kept = [read_state(checkpoint_path(tmp_path / "checkpoints", step))["loss_scaler"] for step in (1, 2, 3)]
    assert [bool(numbers) for numbers in kept] == [False, True, False]
