"""Activations that are computed once more in the backward pass change no gradient."""

from pathlib import Path

import pytest
import torch

from experiment.checkpoints import checkpoint_path
from pretrain.world import World
from rank_pool import RankPool
from runs import TINY, Tree, curve, everything, pretrain_case, settings

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
# Shared by both runs of a comparison. DeBERTa trains padded, one sequence a row.
MODELS = {
    "packed": TINY | DROPOUT,
    "padded": {**TINY, **DROPOUT, "model_type": "deberta"},
}


def counting_case(world: World, tree: Tree) -> int:
    """A run; how often the first layer was computed in it."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    calls = 0
    forward = BertIntermediate.forward

    def counted(self: BertIntermediate, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return forward(self, hidden)

    BertIntermediate.forward = counted  # type: ignore[method-assign]
    try:
        pretrain_case(world, tree)
    finally:
        BertIntermediate.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize(
    "ds_config",
    [
        "fp32_zero0",
        pytest.param("fp32_zero1", marks=pytest.mark.soak),
        pytest.param("bf16_zero2", marks=pytest.mark.soak),
        "bf16_zero3",
    ],
)
def test_gradients_are_the_same_to_the_last_bit(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches dropout that draws other masks the second time, hooks that run twice (the head's selection of predicted
    positions, ZeRO's gathering), and a config key that does nothing."""
    calls, kept = {}, {}
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        tree = settings(folder, wordpiece_corpus, ds_config, model__config=MODELS["packed"], schedule__steps=3)
        tree["model"]["activation_checkpointing"] = recompute
        (calls[recompute], _) = pools[2].run(counting_case, tree)
        kept[recompute] = everything(checkpoint_path(folder / "checkpoints", 3))
    assert calls[True] == 2 * calls[False] > 0
    assert curve(tmp_path / "True") == curve(tmp_path / "False")
    assert all(torch.equal(kept[True][key], kept[False][key]) for key in kept[False])


def test_so_are_those_of_a_padded_model(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """As above, for a model that transformers' attention interface does not reach."""
    for recompute in (False, True):
        tree = settings(tmp_path / str(recompute), wordpiece_corpus, "fp32_zero3", model__config=MODELS["padded"])
        tree["model"]["activation_checkpointing"] = recompute
        pools[2].run(pretrain_case, tree)
    assert curve(tmp_path / "True") == curve(tmp_path / "False")
    assert curve(tmp_path / "True", "grad_norm") == curve(tmp_path / "False", "grad_norm")


def test_a_run_may_take_it_up_when_it_goes_on(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that ran out of memory and is refused the remedy."""
    trees = {}
    for name in ("unbroken", "broken"):
        trees[name] = settings(tmp_path / name, wordpiece_corpus, model__config=MODELS["packed"])
    pools[2].run(pretrain_case, trees["unbroken"])
    assert set(pools[2].run(pretrain_case, trees["broken"], 3)) == {"stopped"}
    trees["broken"]["model"]["activation_checkpointing"] = True
    assert set(pools[2].run(pretrain_case, trees["broken"])) == {"done"}
    assert curve(tmp_path / "broken") == curve(tmp_path / "unbroken")
