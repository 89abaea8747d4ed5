"""The exponential moving average of the weights (EMA)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from experiment.run_files.checkpoints import checkpoint_path
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    Tree,
    assert_same_tensors,
    build_engine,
    microbatch,
    pretrain_case,
    run_config,
    save_engine,
    saved_tensors,
    soak,
)

DECAY = 0.7


def tensors_of_kind(kept: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.removesuffix(f"/{kind}"): tensor for key, tensor in kept.items() if key.endswith(f"/{kind}")}


def ema_config(folder: Path, corpus: Path, ds_config: str, **changes: Any) -> Tree:
    tree = run_config(folder, corpus, ds_config, checkpoint__every_steps=1, schedule__steps=3, **changes)
    tree["model"]["ema_decay"] = DECAY
    return tree


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [
        (3, "fp32_zero1"),
        (2, "bf16_zero3"),
        *soak((2, "fp32_zero0"), (2, "bf16_zero1"), (2, "fp32_zero2_cpu_offload"), (2, "bf16_zero3_cpu_offload")),
    ],
)
def test_ema_is_that_of_the_master_weights(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str
) -> None:
    """Catches an average of rounded weights, a decay and its complement swapped, a step too few or too many, fragments
    that are mixed up, and an hf-ema folder that holds the plain weights or does not open."""
    pools[world_size].run(pretrain_case, ema_config(tmp_path, wordpiece_corpus, ds_config))
    kept = [saved_tensors(checkpoint_path(tmp_path / "checkpoints", step)) for step in (1, 2, 3)]
    expected = {name: tensor.double() for name, tensor in tensors_of_kind(kept[0], "ema").items()}
    for step in kept[1:]:
        for name, master in tensors_of_kind(step, "fp32").items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * master.double()
    found = tensors_of_kind(kept[-1], "ema")
    assert found.keys() == tensors_of_kind(kept[-1], "fp32").keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)

    folder = checkpoint_path(tmp_path / "checkpoints", 3)
    models = {which: AutoModelForMaskedLM.from_pretrained(folder / which) for which in ("hf", "hf-ema")}
    for which, kind in (("hf", "fp32"), ("hf-ema", "ema")):
        for name, parameter in models[which].named_parameters():
            assert torch.equal(parameter.detach().flatten(), kept[-1][f"model.{name}/{kind}"]), (which, name)


def average_case(world: World, tree: Tree, folder: Path, source: Path | None, limits: list[float]) -> list[bool]:
    """Load `source`, if any, and take a step for each norm limit. Saves step 1 before the first one, and one more after
    each. Returns which updates were applied."""
    from pretrain.training.checkpoint_tensors import load_checkpoint

    engine, _ = build_engine(world, tree)
    if source is not None:
        load_checkpoint(engine, source)
    save_engine(engine, folder, 1)
    applied = []
    for step, limit in enumerate(limits):
        engine.begin_step(step, 0.01)
        engine.accumulate(microbatch(), 6.0, 0, 0)
        applied.append(engine.step(limit).wait().applied)
        save_engine(engine, folder, step + 2)
    engine.close()
    return applied


@pytest.mark.parametrize(
    ("ds_config", "optimizer"),
    [
        ("fp32_zero0", "adamw"),
        ("fp32_zero2", "adamw"),
        ("bf16_zero3", "muon"),
        *soak(("fp32_zero1", "muon"), ("fp32_zero0", "muon"), ("bf16_zero2", "muon")),
    ],
)
def test_ema_starts_at_the_weights_and_skips_vetoed_updates(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, optimizer: str
) -> None:
    """Catches an average that starts at zero, and weights, moments or an average that change in a vetoed update."""
    tree = ema_config(tmp_path, wordpiece_corpus, ds_config, optimizer__name=optimizer)
    assert pools[2].run(average_case, tree, tmp_path, None, [9.0, 1e-9])[0] == [True, False]
    start, one, vetoed = (saved_tensors(checkpoint_path(tmp_path, step)) for step in (1, 2, 3))
    before = tensors_of_kind(start, "fp32")
    for name, tensor in tensors_of_kind(start, "ema").items():
        assert torch.equal(tensor, before[name])
    for name, tensor in tensors_of_kind(one, "ema").items():
        torch.testing.assert_close(tensor, DECAY * before[name] + (1 - DECAY) * one[f"{name}/fp32"])
    assert all(torch.equal(one[key], vetoed[key]) for key in one)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, "fp32_zero1"), (3, "fp32_zero3")),
        *soak(((3, "fp32_zero3"), (1, "fp32_zero0")), ((1, "fp32_zero0"), (2, "bf16_zero1"))),
    ],
)
def test_ema_moves_between_layouts_bit_by_bit(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    tmp_path: Path,
    source: tuple[int, str],
    target: tuple[int, str],
) -> None:
    """Catches an average that a resume resets, or treats as optimizer state."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    pools[source[0]].run(average_case, ema_config(tmp_path, wordpiece_corpus, source[1]), made, None, [9.0, 9.0])
    pools[target[0]].run(
        average_case, ema_config(tmp_path, wordpiece_corpus, target[1]), moved, checkpoint_path(made, 3), []
    )
    one, other = saved_tensors(checkpoint_path(made, 3)), saved_tensors(checkpoint_path(moved, 1))
    assert any(key.endswith("/ema") for key in one)
    assert_same_tensors(one, other)


def test_a_fork_can_start_or_end_ema(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a fork that is rejected, an average that does not start at the loaded weights, and one that a run without
    EMA loads into its optimizer."""
    without_ema = run_config(tmp_path / "without", wordpiece_corpus, "fp32_zero1", schedule__steps=1)
    with_ema = ema_config(tmp_path / "with", wordpiece_corpus, "fp32_zero1")
    pools[2].run(pretrain_case, without_ema)
    parent = checkpoint_path(tmp_path / "without" / "checkpoints", 1)
    with_ema["run"]["resume"] = str(parent)
    assert set(pools[2].run(pretrain_case, with_ema)) == {"done"}
    begun = saved_tensors(checkpoint_path(tmp_path / "with" / "checkpoints", 2))
    before = tensors_of_kind(saved_tensors(parent), "fp32")
    for name, tensor in tensors_of_kind(begun, "ema").items():
        torch.testing.assert_close(tensor, DECAY * before[name] + (1 - DECAY) * begun[f"{name}/fp32"])
    again = run_config(tmp_path / "again", wordpiece_corpus, "fp32_zero1", schedule__steps=4)
    again["run"]["resume"] = str(checkpoint_path(tmp_path / "with" / "checkpoints", 3))
    assert set(pools[2].run(pretrain_case, again)) == {"done"}
    ended = checkpoint_path(tmp_path / "again" / "checkpoints", 4)
    assert not any(key.endswith("/ema") for key in saved_tensors(ended))
    assert not (ended / "hf-ema").exists()
