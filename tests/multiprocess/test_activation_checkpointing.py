"""Activation checkpointing changes no gradient."""

from pathlib import Path

import pytest
import torch

from experiment.run_files.checkpoints import checkpoint_path
from pretrain.world import World
from rank_pool import RankPool
from runs import TINY, Tree, assert_same_tensors, logged, pretrain_case, run_config, saved_tensors, soak

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
# DeBERTa trains padded, one sequence a row.
MODELS = {
    "packed": TINY | DROPOUT,
    "padded": {**TINY, **DROPOUT, "model_type": "deberta"},
}


def counting_case(world: World, tree: Tree) -> int:
    """Run, and return how often a layer's forward was called."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    calls = 0
    forward = BertIntermediate.forward

    def counted(self: BertIntermediate, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled() and self.training  # not where the model is tested as it is built
        return forward(self, hidden)

    BertIntermediate.forward = counted  # type: ignore[method-assign]
    try:
        pretrain_case(world, tree)
    finally:
        BertIntermediate.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize(
    "ds_config",
    ["bf16_zero3", *soak("fp32_zero0", "fp32_zero1", "bf16_zero2")],
)
def test_recomputation_changes_no_bit(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches recomputation with other dropout masks, hooks that run twice (the head's selection of masked positions,
    ZeRO's gathering), a config key that has no effect, and a run that ran out of memory and is not allowed to resume
    with less."""

    def config(name: str, recompute: bool) -> Tree:
        changes = {"model__config": MODELS["packed"], "model__activation_checkpointing": recompute}
        return run_config(tmp_path / name, wordpiece_corpus, ds_config, schedule__steps=2, **changes)

    calls, kept = {}, {}
    for recompute in (False, True):
        (calls[recompute], _) = pools[2].run(counting_case, config(str(recompute), recompute))
        kept[recompute] = saved_tensors(checkpoint_path(tmp_path / str(recompute) / "checkpoints", 2))
    assert calls[True] == 2 * calls[False] > 0
    assert logged(tmp_path / "True") == logged(tmp_path / "False")
    assert_same_tensors(kept[True], kept[False])
    assert set(pools[2].run(pretrain_case, config("resumed", recompute=False), 1)) == {"stopped"}
    assert set(pools[2].run(pretrain_case, config("resumed", recompute=True))) == {"done"}
    assert logged(tmp_path / "resumed") == logged(tmp_path / "False")


def test_recomputation_of_a_padded_model_changes_no_bit(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches the same in a model that does not use transformers' attention interface."""
    for recompute in (False, True):
        changes = {"model__config": MODELS["padded"], "schedule__steps": 2}
        tree = run_config(tmp_path / str(recompute), wordpiece_corpus, "fp32_zero1", **changes)
        tree["model"]["activation_checkpointing"] = recompute
        pools[2].run(pretrain_case, tree)
    assert logged(tmp_path / "True") == logged(tmp_path / "False")
    assert logged(tmp_path / "True", "grad_norm") == logged(tmp_path / "False", "grad_norm")
