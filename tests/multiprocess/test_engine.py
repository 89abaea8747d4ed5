"""The engine at every ZeRO stage: precision, learning rates, vetoed updates, clipping, dropout."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from experiment.config import build_config
from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.resolve import resolve
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    SHALLOW,
    TINY,
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


def rotary_case(world: World, tree: Tree) -> dict[str, tuple[str, bool]]:
    """The dtype of each floating-point buffer in the engine, and whether its values are those of a new model."""
    from transformers import AutoModelForMaskedLM

    engine, model = build_engine(world, tree)
    fresh = dict(AutoModelForMaskedLM.from_config(model.config).named_buffers())
    found = {
        name: (str(buffer.dtype), torch.equal(buffer.float(), fresh[name].float()))
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }
    computed_in = {str(parameter.dtype) for parameter in model.parameters()}
    engine.close()
    assert computed_in == {"torch.bfloat16"}
    return found


@pytest.mark.parametrize("stage", [1, 3, *soak(2)])
def test_rotary_frequencies_stay_in_fp32(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Catches frequencies that are rounded to bf16 with the weights, which shifts positions in long sequences."""
    model = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    tree = run_config(
        tmp_path, wordpiece_corpus, f"bf16_zero{stage}", model__config=model | {"model_type": "modernbert"}
    )
    (found,) = pools[1].run(rotary_case, tree)
    assert any("inv_freq" in name for name in found)
    assert set(found.values()) == {("torch.float32", True)}


def steps_case(world: World, tree: Tree, folder: Path) -> list[bool]:
    """Steps with a learning rate of 0, a normal one, and NaN gradients, each saved. Returns which were applied."""

    engine, _ = build_engine(world, tree)
    applied = []
    save_engine(engine, folder, 1)
    for step, (rate, masked) in enumerate([(0.0, 6.0), (0.01, 6.0), (0.01, float("nan"))], start=2):
        engine.begin_step(step, rate)
        micro = microbatch()._replace(masked_positions=torch.tensor([1, 4, 20]))
        engine.accumulate(micro, masked, step, 0)
        applied.append(engine.step().wait().applied)
        save_engine(engine, folder, step)
    engine.close()
    return applied


def other_weights_case(world: World, tree: Tree, folder: Path) -> None:
    engine, _ = build_engine(world, tree, seed=1 + world.rank)
    save_engine(engine, folder, 1)
    engine.close()


def test_all_ranks_begin_with_the_weights_of_rank_0(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a model that is put together from the files of hosts that differ."""
    tree = run_config(tmp_path, wordpiece_corpus, "bf16_zero1")
    pools[2].run(other_weights_case, tree, tmp_path)
    run = resolve(build_config(PretrainConfig, tree), 2)
    model = MaskedLanguageModel(build_model(run.config.model, run.model_config, seed=1).model)
    masters = saved_tensors(checkpoint_path(tmp_path, 1))
    for name, weight in model.named_parameters():
        assert_close(masters[f"{name}/fp32"], weight.flatten(), rtol=2**-8, atol=0.0)  # rounded to bf16, at most


def first_gradient(kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """The clipped gradient of the only step before a checkpoint."""
    return torch.cat([kept[key].flatten() for key in kept if key.endswith("/exp_avg")]) / (1 - 0.9)


@pytest.mark.parametrize(
    "ds_config",
    [
        *("fp32_zero0", "bf16_zero1", "fp32_zero2", "bf16_zero3"),
        *soak("bf16_zero0", "fp32_zero1", "bf16_zero2", "fp32_zero3"),
    ],
)
def test_learning_rates_are_applied_and_nan_is_not(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches learning rates that do not reach the optimizer, updates while the engine is built, weights that a NaN
    gradient makes NaN, and clipping by the norm of a rank's share or of a parameter group, or none at all."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, optimizer__grad_clip=0.01)
    assert pools[2].run(steps_case, tree, tmp_path) == [[True, True, False]] * 2
    start, still, moved, last = (saved_tensors(checkpoint_path(tmp_path, step)) for step in (1, 2, 3, 4))
    masters = [key for key in start if key.endswith("/fp32")]
    assert all(torch.equal(start[key], still[key]) for key in masters)
    assert first_gradient(still).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert not all(torch.equal(still[key], moved[key]) for key in masters)
    assert all(torch.equal(moved[key], last[key]) for key in moved)


@pytest.mark.soak
@pytest.mark.parametrize("ds_config", ["fp32_zero0", "fp32_zero1", "fp32_zero2", "fp32_zero3", "bf16_zero1"])
def test_the_gradient_of_a_run_is_clipped_by_its_global_norm(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches clipping by the norm of a rank's share or of a parameter group, or none at all, of a gradient to which
    ranks contribute different batches."""
    tree = run_config(
        tmp_path,
        wordpiece_corpus,
        ds_config,
        model__config=SHALLOW | NO_DROPOUT,
        optimizer__grad_clip=0.01,
        schedule__steps=1,
    )
    pools[2].run(pretrain_case, tree)
    kept = saved_tensors(checkpoint_path(tmp_path / "checkpoints", 1))
    assert first_gradient(kept).norm().item() == pytest.approx(0.01, rel=1e-3)


def entered_modules_case(world: World, tree: Tree) -> list[int]:
    """After each of a few steps, how many modules DeepSpeed's ZeRO 3 takes for being computed."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    engine, _ = build_engine(world, tree)
    counts = []
    for step in range(3):
        engine.begin_step(step, 0.01)
        engine.accumulate(microbatch(), 6, step, 0)
        engine.step()
        counts.append(len(FWD_MODULE_STACK))
    engine.close()
    return counts


def test_a_layer_that_ends_early_leaves_no_trace_in_zero_3(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches hooks of DeepSpeed's that begin in the last layer and do not end: its list of modules would grow."""
    tree = run_config(tmp_path, wordpiece_corpus, "fp32_zero3")
    for counts in pools[2].run(entered_modules_case, tree):
        assert len(set(counts)) == 1


def veto_case(world: World, tree: Tree, folder: Path) -> list[tuple[bool, float]]:
    """Take steps of the same microbatch: two, saved as 1 and 2, then after 1, which is loaded again, a vetoed one and
    another one, saved as 3."""
    from pretrain.training.checkpoint_tensors import load_checkpoint

    engine, _ = build_engine(world, tree)

    def step(limit: float = float("inf")) -> tuple[bool, float]:
        engine.begin_step(0, 0.01)
        engine.accumulate(microbatch(), 6.0, 0, 0)
        return tuple(engine.step(limit).wait())

    results = []
    for number in (1, 2):
        results.append(step())
        save_engine(engine, folder, number)
    load_checkpoint(engine, checkpoint_path(folder, 1))
    results += [step(0.002), step()]
    save_engine(engine, folder, 3)
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
def test_a_vetoed_update_changes_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a vetoed update that decays weights, changes moments or step counters, or keeps its gradient for the next
    one; a limit that is compared with the clipped norm; and a checkpoint that an engine loads wrongly after steps."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, optimizer__grad_clip=1e-3)
    ((_, without, vetoed, after), _) = pools[2].run(veto_case, tree, tmp_path)
    assert vetoed == (False, without[1])
    assert without == after
    assert after[0]
    assert after[1] > 0.002
    assert_same_tensors(*(saved_tensors(checkpoint_path(tmp_path, number)) for number in (2, 3)))


def dropout_case(world: World, tree: Tree) -> dict[str, float]:
    """The loss of the same microbatch with dropout, at several places of a run."""
    engine, _ = build_engine(world, tree)
    places = {"here": (3, 0), "here again": (3, 0), "another step": (4, 0), "another microbatch": (3, 1)}
    losses = {place: float(engine.accumulate(microbatch(), 6, *at)) for place, at in places.items()}
    engine.close()
    return losses


def test_dropout_is_keyed_by_seed_step_rank_and_microbatch(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches dropout masks that repeat at every step or on every rank, and masks that a resume would not repeat."""
    trees = [run_config(tmp_path, wordpiece_corpus, run__seed=seed) for seed in (1, 2)]
    one, other = (pools[2].run(dropout_case, tree) for tree in trees)
    for losses in (*one, *other):
        assert losses["here"] == losses["here again"]
    places = {(number, place) for number in range(2) for place in one[0] if place != "here again"}
    distinct = {one[rank][place] for rank, place in places}
    assert len(distinct) == len(places)
    assert one[0]["here"] != other[0]["here"]


def test_a_changed_zero_stage_is_logged_once(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a ZeRO stage that is changed silently, and a message from each rank or for each time the file is read."""
    pools[2].run(pretrain_case, run_config(tmp_path, wordpiece_corpus, "bf16_zero0", schedule__steps=1))
    logs = [RunFolder(tmp_path).rank_log(rank).read_text(encoding="utf-8") for rank in (0, 1)]
    assert [log.count("ZeRO 0 in bf16 runs as ZeRO 1") for log in logs] == [1, 0]
