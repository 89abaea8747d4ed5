"""Parameters that are frozen for the first steps: `model.freeze`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForMaskedLM

from experiment.config import build_config
from experiment.models.tokenizer import load_tokenizer
from experiment.models.transformers_models import parameters_in
from experiment.run_files.checkpoints import checkpoint_path, read_state
from experiment.run_files.outcome_file import read_outcome
from experiment.run_files.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.resolve import resolve
from pretrain.world import World
from rank_pool import RankError, RankPool
from runs import (
    NO_DROPOUT,
    TINY,
    Tree,
    assert_same_tensors,
    build_engine,
    logged,
    microbatch,
    pretrain_case,
    run_config,
    save_engine,
    saved_tensors,
    soak,
)
from tiny_models import tiny_fields

FROZEN = ("embeddings", "layer.0")


def is_frozen(key: str) -> bool:
    return any(f".{item}." in key for item in FROZEN)


def gradient_norm(kept: dict[str, Tensor], keys: list[str]) -> float:
    """Norm of the gradient of a first step without clipping: Adam's first moment divided by 1 - beta."""
    return float(torch.cat([kept[key] for key in keys]).double().norm()) / (1 - 0.9)


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [
        (2, "fp32_zero3"),
        (2, "bf16_zero1"),
        *soak(
            (3, "bf16_zero1"),
            (2, "fp32_zero0"),
            (2, "fp32_zero2"),
            (3, "fp32_zero1"),
            (1, "bf16_zero3"),
            (2, "bf16_zero2_cpu_offload"),
            (2, "fp32_zero3_cpu_offload"),
        ),
    ],
)
def test_frozen_parameters_change_only_after_freeze_steps(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str
) -> None:
    """Catches decay, moments or step counters of frozen parameters, their share of the gradient norm, weights that are
    rounded to 16 bits before the first step, parameters that stay frozen, and moments that are not corrected for their
    first step after unfreezing."""
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
    frozen_keys = [key for key in frozen[0] if is_frozen(key)]
    unfrozen_keys = [key for key in free if not is_frozen(key) and key.endswith("/exp_avg")]

    assert frozen_keys
    assert all(key.endswith("/fp32") for key in frozen_keys), "a frozen parameter has optimizer state"
    run = resolve(build_config(PretrainConfig, trees["frozen"]), world_size)
    built = build_model(run.config.model, run.model_config, run.config.run.seed)
    initial = {f"{name}/fp32": each.view(-1) for name, each in MaskedLanguageModel(built.model).named_parameters()}
    for tensors in frozen[:2]:
        assert all(torch.equal(tensors[key], initial[key]) for key in frozen_keys)
    assert not any(torch.equal(frozen[1][key], frozen[2][key]) for key in frozen_keys if "padding" not in key)
    assert {float(value) for key, value in frozen[3].items() if is_frozen(key) and key.endswith("/step")} == {2.0}
    assert {float(value) for key, value in frozen[3].items() if not is_frozen(key) and key.endswith("/step")} == {4.0}

    relative = 1e-5 if ds_config.startswith("fp32") else 1e-2
    norms = logged(tmp_path / "frozen", "grad_norm")
    assert norms[0] == pytest.approx(gradient_norm(free, unfrozen_keys), rel=relative)
    assert norms[0] < 0.95 * logged(tmp_path / "free", "grad_norm")[0], "the frozen part is too small to show"
    first = gradient_norm(frozen[2], [key for key in frozen[2] if is_frozen(key) and key.endswith("/exp_avg")])
    num_norms = [
        len(read_state(checkpoint_path(tmp_path / "frozen" / "checkpoints", step))["progress"]["norms"])
        for step in (1, 2, 3)
    ]
    assert num_norms == [1, 0, 1], "norms from before unfreezing would make the next norm a spike"
    assert 0.1 * norms[2] < first < norms[2], "the first moment after unfreezing is one gradient times 1 - beta"


@pytest.mark.parametrize(
    ("world_size", "ds_config", "optimizer"),
    [
        (2, "fp32_zero3", "lamb"),
        *soak(
            (2, "fp32_zero1", "adamw"),
            (2, "fp32_zero0", "adamw"),
            (2, "bf16_zero3", "stableadamw"),
            (2, "fp32_zero1", "muon"),
            (3, "bf16_zero2", "lamb"),
        ),
    ],
)
def test_a_run_resumed_before_unfreezing_is_the_uninterrupted_one(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str, optimizer: str
) -> None:
    """Catches freeze_steps counted from the resume, optimizer state that a resume gives to frozen parameters, and an
    optimizer that confuses a frozen group with one that ZeRO 3 has emptied."""
    trees = {
        name: run_config(tmp_path / name, wordpiece_corpus, ds_config, model__config=TINY, schedule__steps=4)
        for name in ("uninterrupted", "resumed")
    }
    for tree in trees.values():
        tree["model"] |= {"freeze": list(FROZEN), "freeze_steps": 2}
        tree["optimizer"] |= {"layer_decay": 0.7, "name": optimizer}
    pools[world_size].run(pretrain_case, trees["uninterrupted"])
    assert pools[world_size].run(pretrain_case, trees["resumed"], 1)[0] == "stopped"
    pools[world_size].run(pretrain_case, trees["resumed"])
    one, other = (saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 4)) for name in trees)
    assert {float(value) for key, value in one.items() if is_frozen(key) and key.endswith("/step")} == {2.0}
    assert_same_tensors(one, other)
    assert logged(tmp_path / "resumed", "grad_norm") == logged(tmp_path / "uninterrupted", "grad_norm")


def frozen_otherwise_case(world: World, tree: Tree, stop_after: int) -> str:
    """A run whose version of deepcloze does not freeze the word embeddings."""
    from pretrain.engine import parameter_groups

    def frozen(*arguments: Any) -> set[str]:
        return {name for name in parameters_in(*arguments) if "word_embeddings" not in name}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter_groups, "parameters_in", frozen)
        return pretrain_case(world, tree, stop_after)


@pytest.mark.parametrize(
    ("ds_config", "step", "message"),
    [
        ("fp32_zero1", 3, "updated in 1 steps, 'bert.embeddings.word_embeddings.weight' in 3."),
        ("fp32_zero3", 1, "updated in 0 steps, 'bert.embeddings.word_embeddings.weight' in 1."),
        ("fp32_zero0", 3, None),
    ],
)
def test_a_run_whose_version_froze_other_parameters(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, step: int, message: str | None
) -> None:
    """Catches parameters that a resume gives the step count of others, and so updates of a wrong size. At ZeRO 0 each
    has its own."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, schedule__steps=4)
    tree["model"] |= {"freeze": ["embeddings"], "freeze_steps": 2}
    assert pools[2].run(frozen_otherwise_case, tree, step)[0] == "stopped"
    if message is None:
        assert pools[2].run(pretrain_case, tree)[0] == "done"
        return
    with pytest.raises(RankError, match=message):
        pools[2].run(pretrain_case, tree)
    _, said, _ = read_outcome(RunFolder(tmp_path)) or (None, "", None)
    assert said.endswith("finish the run with that version, or start again")
    assert len(said) < 500


@pytest.mark.parametrize("freeze", [{}, {"freeze": ["encoder"], "freeze_steps": 1}])
@pytest.mark.parametrize("ds_config", ["fp32_zero1", *soak("fp32_zero0", "fp32_zero2", "fp32_zero3")])
def test_unused_parameters_stay_as_they_are(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, freeze: Tree
) -> None:
    """Catches weights that change although the model does not train them, a traceback if they are frozen or the run is
    resumed, a resume that is refused at ZeRO 0, and a checkpoint that no run can start from, for lack of them.
    RoFormer's sinusoidal positions require a gradient when transformers has loaded them from a folder."""
    tokenizer = load_tokenizer(wordpiece_corpus / "tokenizer")
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    start = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roformer", **tiny_fields("roformer") | tokens))
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    options = {"optimizer__weight_decay": 0.5, "schedule__steps": 3}
    tree = run_config(tmp_path / "run", wordpiece_corpus, ds_config, **options)
    tree["model"] = {"init_from": str(tmp_path / "start")} | freeze
    assert pools[2].run(pretrain_case, tree, 1) == ["stopped"] * 2
    assert pools[2].run(pretrain_case, tree, 1) == ["stopped"] * 2
    tree["engine"]["ds_config"] = "fp32_zero0"
    assert pools[2].run(pretrain_case, tree) == ["done"] * 2
    trained = AutoModelForMaskedLM.from_pretrained(last := checkpoint_path(tmp_path / "run" / "checkpoints", 3) / "hf")
    pairs = zip(start.named_parameters(), trained.parameters(), strict=True)
    changes = {name: float((after - before).detach().abs().max()) for (name, before), after in pairs}
    assert [name for name, change in changes.items() if change == 0] == ["roformer.encoder.embed_positions.weight"], (
        changes
    )
    following = run_config(tmp_path / "following", wordpiece_corpus, ds_config, schedule__steps=1)
    assert pools[2].run(pretrain_case, following | {"model": {"init_from": str(last)}}) == ["done"] * 2


def rewind_case(world: World, tree: Tree, folder: Path) -> None:
    """Save a frozen step as 1 and an unfrozen one as 2; rewind to 1, save that as 3, and the repeated step as 4."""
    from pretrain.training.checkpoint_tensors import load_checkpoint

    engine, _ = build_engine(world, tree)

    def step(number: int) -> None:
        engine.begin_step(number, 0.01)
        engine.accumulate(microbatch(), 6.0, number, 0)
        engine.step()

    def save(name: int) -> None:
        save_engine(engine, folder, name)

    step(0)
    save(1)
    step(1)
    save(2)
    states = engine._deepspeed.basic_optimizer.state.values()
    moments = [StorageWeakRef(state["exp_avg"].untyped_storage()) for state in states]
    assert moments
    load_checkpoint(engine, checkpoint_path(folder, 1))
    assert all(moment.expired() for moment in moments)
    save(3)
    step(1)
    save(4)
    engine.close()


@pytest.mark.parametrize("ds_config", ["fp32_zero0", "bf16_zero1", "fp32_zero3", *soak("fp32_zero2")])
def test_a_rewind_to_before_unfreezing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches moments, step counters and averages that survive a rewind to before they existed, or leak memory."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, model__config=TINY)
    tree["model"] |= {"freeze": list(FROZEN), "freeze_steps": 1, "ema_decay": 0.9}
    pools[2].run(rewind_case, tree, tmp_path)
    first, second, back, again = (saved_tensors(checkpoint_path(tmp_path, name)) for name in (1, 2, 3, 4))
    assert any(is_frozen(key) and key.endswith("/exp_avg") for key in second)
    for one, other in ((first, back), (second, again)):
        assert_same_tensors(one, other)
