"""LAMB and StableAdamW scale an update by figures of whole parameters, which ZeRO cuts across ranks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiment.checkpoints import checkpoint_path
from rank_pool import RankPool
from runs import NO_DROPOUT, TINY, Tree, logged, pretrain_case, run_config, saved_tensors

RULES = ("lamb", "stableadamw")
LAYOUTS = [(size, f"fp32_zero{stage}") for size in (1, 2, 3) for stage in range(4)]
LAYOUTS += [(2, "fp32_zero2_cpu_offload"), (3, "fp32_zero3_cpu_offload")]
SAMPLE = [
    ("lamb", 2, "fp32_zero2"),
    ("lamb", 3, "fp32_zero3"),
    ("stableadamw", 3, "fp32_zero1"),
    ("stableadamw", 2, "fp32_zero3"),
]


def tree_of(folder: Path, corpus: Path, rule: str, ds_config: str) -> Tree:
    """Five steps of a model whose parameters are divisible by nothing. A large eps keeps rounding from being magnified
    where gradients are almost zero."""
    model = TINY | NO_DROPOUT | {"hidden_size": 22, "intermediate_size": 37}
    tree = run_config(folder, corpus, ds_config, model__config=model, schedule__steps=5)
    tree["optimizer"] = {"name": rule, "lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}
    return tree


@pytest.fixture(scope="session")
def alone(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Rule -> what one process without ZeRO arrives at."""
    found = {}
    for rule in RULES:
        folder = tmp_path_factory.mktemp(rule)
        pools[1].run(pretrain_case, tree_of(folder, wordpiece_corpus, rule, "fp32_zero0"))
        found[rule] = saved_tensors(checkpoint_path(folder / "checkpoints", 5))
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> float:
    """The largest of a parameter's masters or states, element by element root mean square.

    Not relative to the parameter: the biases of BERT's keys have no gradient but rounding, and stay almost zero.
    """
    keys = [key for key in one if key.endswith(f"/{kind}")]
    return max(float((one[key] - other[key]).square().mean().sqrt()) for key in keys)


@pytest.mark.parametrize(
    ("rule", "world_size", "ds_config"),
    [
        pytest.param(rule, *layout, marks=() if (rule, *layout) in SAMPLE else pytest.mark.soak)
        for rule in RULES
        for layout in LAYOUTS
    ],
)
def test_every_layout_arrives_where_one_process_does(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    alone: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    rule: str,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches norms of a rank's share in place of the parameter's, and ranks that sum a different number of times."""
    pools[world_size].run(pretrain_case, tree_of(tmp_path, wordpiece_corpus, rule, ds_config))
    found = saved_tensors(checkpoint_path(tmp_path / "checkpoints", 5))
    assert found.keys() == alone[rule].keys()
    assert distance(alone[rule], found, "fp32") < 1e-6
    assert distance(alone[rule], found, "exp_avg") < 1e-7
    index = json.loads((checkpoint_path(tmp_path / "checkpoints", 5) / "engine" / "index.json").read_text("utf-8"))
    cut = sum(len(entry["fragments"]) > 1 for entry in index.values())
    assert (cut > 0) == (world_size > 1 and not ds_config.endswith("0")), "the layout cuts no parameter"


@pytest.mark.parametrize(
    ("rule", "world_size", "ds_config"),
    [
        ("lamb", 2, "bf16_zero1"),
        pytest.param("stableadamw", 2, "fp32_zero2", marks=pytest.mark.soak),
        pytest.param("stableadamw", 1, "bf16_zero3", marks=pytest.mark.soak),
    ],
)
def test_a_resumed_run_is_the_unbroken_one(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, rule: str, world_size: int, ds_config: str
) -> None:
    """Catches state that is not saved or not restored: moments, and the counter that the bias correction needs."""
    trees = {name: tree_of(tmp_path / name, wordpiece_corpus, rule, ds_config) for name in ("unbroken", "broken")}
    pools[world_size].run(pretrain_case, trees["unbroken"])
    assert pools[world_size].run(pretrain_case, trees["broken"], 2)[0] == "stopped"
    pools[world_size].run(pretrain_case, trees["broken"])
    one, other = (saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 5)) for name in trees)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")
