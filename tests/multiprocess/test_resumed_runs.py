"""A run that was stopped and resumed equals the uninterrupted run."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints
from experiment.run_files.provenance import read_provenance
from experiment.run_files.run_folder import RunFolder
from pretrain.resume import is_fork_of
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    SHALLOW,
    TINY,
    Tree,
    assert_same_tensors,
    build_engine,
    copy_case,
    events_without_timing,
    logged,
    microbatch,
    pretrain_case,
    run_config,
    sampled,
    save_engine,
    saved_tensors,
    soak,
)

Layout = tuple[int, str]  # world size, DeepSpeed file

LAYOUTS = [
    (size, f"{precision}_zero{stage}")
    for size, precision, stage in itertools.product((1, 2, 3), ("fp32", "bf16"), range(4))
    if (precision, stage) != ("bf16", 0)  # it runs as stage 1
]
# (2, "fp32_zero1"): `test_stages_and_mixtures.py`; (2, "bf16_zero1"): `test_sharded_optimizers.py`
# ZeRO 0: the next test, and bit by bit `test_a_vetoed_update_changes_nothing`
EXACT_SAMPLE = [(2, "fp32_zero3")]


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    sampled(LAYOUTS, EXACT_SAMPLE),
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches state that a checkpoint lacks: moments, step counts, schedule, data position, dropout, log interval.

    With dropout; the stop is in the middle of a log interval, and a rank other than 0 is asked to stop.
    """
    runs = {}
    for name, stop_after in (("uninterrupted", None), ("stopped", 3)):
        tree = run_config(
            tmp_path / name,
            wordpiece_corpus,
            ds_config,
            run__log_every=2,
            schedule__steps=5,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=4,
        )
        outcomes = pools[world_size].run(pretrain_case, tree, stop_after)
        if stop_after is not None:
            assert set(outcomes) == {"stopped"}
            assert logged(tmp_path / name, "step") == [2]
            assert complete_checkpoints(tmp_path / name / "checkpoints")[-1].name == "step-00000003"
            outcomes = pools[world_size].run(pretrain_case, tree)
        assert set(outcomes) == {"done"}
        runs[name] = events_without_timing(tmp_path / name)
    assert [event["step"] for event in runs["uninterrupted"]] == [0, 2, 4, 4, 5, 5]
    assert runs["stopped"] == runs["uninterrupted"]
    last = [saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 5)) for name in runs]
    assert_same_tensors(*last)


def test_a_continued_model_has_dropout_from_the_first_step_on(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a loaded model that stays in evaluation mode, without dropout, until the first evaluation: without
    held-out corpora for the whole run, with them after each resume."""
    pools[1].run(pretrain_case, run_config(tmp_path / "start", wordpiece_corpus, schedule__steps=1))
    start = str(checkpoint_path(tmp_path / "start" / "checkpoints", 1) / "hf")

    def config(name: str, dropout: float, **changes: Any) -> Tree:
        tree = run_config(tmp_path / name, wordpiece_corpus, schedule__steps=3, **changes)
        return tree | {"model": {"init_from": start, "config": dict.fromkeys(NO_DROPOUT, dropout)}}

    pools[1].run(pretrain_case, config("without", 0.0))
    pools[1].run(pretrain_case, config("uninterrupted", 0.5))
    evaluated = config("resumed", 0.5, corpus__eval={"held": str(heldout_corpus)})
    assert pools[1].run(pretrain_case, evaluated, 1) == ["stopped"]
    assert pools[1].run(pretrain_case, evaluated) == ["done"]
    losses = {name: logged(tmp_path / name) for name in ("without", "uninterrupted", "resumed")}
    assert losses["resumed"] == losses["uninterrupted"]
    assert losses["uninterrupted"][0] != pytest.approx(losses["without"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("first", "then", "optimizer"),
    [
        ((2, "fp32_zero3"), (1, "fp32_zero0"), "adamw"),
        ((3, "fp32_zero1"), (2, "fp32_zero3"), "muon"),
        *soak(
            ((2, "fp32_zero1"), (3, "fp32_zero2"), "adamw"),
            ((2, "fp32_zero3"), (3, "fp32_zero2"), "muon"),
            ((1, "fp32_zero0"), (2, "fp32_zero1"), "muon"),
        ),
    ],
)
def test_a_run_resumes_at_another_layout(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, first: Layout, then: Layout, optimizer: str
) -> None:
    """Catches state that is lost or misplaced when the world size or the ZeRO stage changes."""
    changes = {"model__config": SHALLOW | NO_DROPOUT, "schedule__steps": 4, "optimizer__name": optimizer}
    uninterrupted = run_config(tmp_path / "uninterrupted", wordpiece_corpus, first[1], **changes)
    pools[first[0]].run(pretrain_case, uninterrupted)
    moved = run_config(tmp_path / "moved", wordpiece_corpus, first[1], **changes)
    assert set(pools[first[0]].run(pretrain_case, moved, 2)) == {"stopped"}
    elsewhere = run_config(tmp_path / "moved", wordpiece_corpus, then[1], batch__microbatch_tokens=300, **changes)
    assert set(pools[then[0]].run(pretrain_case, elsewhere)) == {"done"}
    assert logged(tmp_path / "moved", "step") == [1, 2, 3, 4]
    assert logged(tmp_path / "moved") == pytest.approx(logged(tmp_path / "uninterrupted"), rel=1e-5)
    assert logged(tmp_path / "moved", "lr") == logged(tmp_path / "uninterrupted", "lr")


@pytest.fixture(scope="session")
def saved(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: layout, seed -> a checkpoint after two steps at that layout."""
    made: dict[tuple[Layout, int], Path] = {}

    def checkpoint_of(layout: Layout, seed: int = 8) -> Path:
        if (layout, seed) not in made:
            folder = tmp_path_factory.mktemp("saved")
            tree = run_config(folder, wordpiece_corpus, layout[1], schedule__steps=2, run__seed=seed)
            assert set(pools[layout[0]].run(pretrain_case, tree)) == {"done"}
            made[layout, seed] = checkpoint_path(folder / "checkpoints", 2)
        return made[layout, seed]

    return checkpoint_of


@pytest.mark.parametrize(
    ("target", "sources"),
    [
        ((3, "bf16_zero3"), [(2, "fp32_zero0")]),
        ((2, "fp32_zero2"), [(3, "fp32_zero3")]),
        ((3, "bf16_zero2"), [(2, "bf16_zero1")]),
        *soak(*((layout, LAYOUTS) for layout in LAYOUTS)),
    ],
)
def test_a_checkpoint_moves_between_layouts_bit_by_bit(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    saved: Any,
    tmp_path: Path,
    target: Layout,
    sources: list[Layout],
) -> None:
    """Catches master weights, moments or step counts that are cut, shifted, rounded or lost at some layout."""
    copies = {saved(source): tmp_path / f"{size}-{ds_config}" for source in sources for size, ds_config in [source]}
    tree = run_config(tmp_path, wordpiece_corpus, target[1])
    pools[target[0]].run(copy_case, tree, copies, saved(target, seed=9) if len(sources) > 1 else None)
    for original, copied in copies.items():
        before, after = saved_tensors(original), saved_tensors(checkpoint_path(copied, 2))
        assert before.keys() == after.keys(), copied
        assert {key.rpartition("/")[2] for key in before} == {"fp32", "exp_avg", "exp_avg_sq", "step"}, copied
        assert [key for key in before if not torch.equal(before[key], after[key])] == [], copied
        assert {float(before[key]) for key in before if key.endswith("/step")} == {2.0}, copied


def step_or_load_case(world: World, tree: Tree, folder: Path, source: Path | None) -> int:
    """Take a step, or load `source` instead, and save as step 1. Returns the number of parameter groups."""
    from pretrain.training.checkpoint_tensors import load_checkpoint

    engine, _ = build_engine(world, tree)
    if source is None:
        engine.begin_step(0, 0.01)
        engine.accumulate(microbatch(), 6.0, 0, 0)
        engine.step()
    else:
        load_checkpoint(engine, source)
    save_engine(engine, folder, 1)
    groups = len(engine._deepspeed.basic_optimizer.param_groups)
    engine.close()
    return groups


@pytest.mark.parametrize(
    "ds_config",
    ["fp32_zero1", *soak("fp32_zero3", "bf16_zero2")],
)
def test_layer_decay_can_change_on_resume(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches moments and step counters that are restored by parameter group instead of by parameter."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, model__config=TINY)
    made, moved = tmp_path / "made", tmp_path / "moved"
    assert pools[2].run(step_or_load_case, tree, made, None) == [2, 2]
    tree["optimizer"] |= {"layer_decay": 0.8}
    assert pools[2].run(step_or_load_case, tree, moved, checkpoint_path(made, 1)) == [8, 8]
    one, other = saved_tensors(checkpoint_path(made, 1)), saved_tensors(checkpoint_path(moved, 1))
    assert_same_tensors(one, other)


def test_a_run_of_which_only_checkpoints_were_copied(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches another id, with which W&B shows another run, and ancestors that are lost; and a copy of a whole run that
    W&B and a mirror take for the same one."""
    tree = run_config(tmp_path / "first", wordpiece_corpus, schedule__steps=2)
    assert pools[1].run(pretrain_case, tree, 1) == ["stopped"]
    first, copied = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "copied")
    shutil.copytree(first.checkpoints, copied.checkpoints)
    before = read_provenance(first)
    first.path.rename(tmp_path / "elsewhere")
    tree["run"]["dir"] = str(copied.path)
    assert pools[1].run(pretrain_case, tree) == ["done"]
    after = read_provenance(copied)
    assert (after["run_id"], after["ancestors"]) == (before["run_id"], before["ancestors"])
    assert [attempt["step"] for attempt in after["attempts"]] == [0, 1]
    shutil.copytree(copied.checkpoints, tmp_path / "twin" / "checkpoints")
    tree["run"]["dir"] = str(tmp_path / "twin")
    assert pools[1].run(pretrain_case, tree) == ["done"]
    twin = read_provenance(RunFolder(tmp_path / "twin"))
    assert twin["run_id"] != before["run_id"]
    assert is_fork_of([{"relation": "fork", "run_id": before["run_id"], "step": 2}], str(tmp_path / "twin"))
