"""LAMB and StableAdamW scale updates by norms of whole parameters, which ZeRO shards across ranks."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from experiment.run_files.checkpoints import checkpoint_path
from fp16 import any_precision_case
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    TINY,
    Tree,
    assert_same_tensors,
    logged,
    pretrain_case,
    run_config,
    sampled,
    saved_tensors,
    soak,
)

RULES = ("lamb", "stableadamw")
LAYOUTS = [(size, f"fp32_zero{stage}") for size in (1, 2, 3) for stage in range(4)]
LAYOUTS += [(2, "fp32_zero2_cpu_offload"), (3, "fp32_zero3_cpu_offload")]
SAMPLE = [("lamb", 3, "fp32_zero3"), ("stableadamw", 3, "fp32_zero1")]


def optimizer_config(folder: Path, corpus: Path, rule: str, ds_config: str) -> Tree:
    """Three steps of a model whose sizes no world size divides. The large eps keeps Adam from amplifying rounding
    errors of gradients near zero."""
    model = TINY | NO_DROPOUT | {"hidden_size": 22, "intermediate_size": 37}
    tree = run_config(folder, corpus, ds_config, model__config=model, schedule__steps=3)
    tree["optimizer"] = {"name": rule, "lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}
    return tree


@pytest.fixture(scope="session")
def one_process(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Rule -> final tensors of one process without ZeRO."""
    found = {}
    for rule in RULES:
        folder = tmp_path_factory.mktemp(rule)
        pools[1].run(pretrain_case, optimizer_config(folder, wordpiece_corpus, rule, "fp32_zero0"))
        found[rule] = saved_tensors(checkpoint_path(folder / "checkpoints", 3))
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> float:
    """The largest root mean square difference of a parameter's master weights or state.

    Not relative to the parameter: the gradients of BERT's key biases are rounding errors only, so they stay near zero.
    """
    keys = [key for key in one if key.endswith(f"/{kind}")]
    return max(float((one[key] - other[key]).square().mean().sqrt()) for key in keys)


@pytest.mark.parametrize(
    ("rule", "world_size", "ds_config"),
    sampled([(rule, *layout) for rule in RULES for layout in LAYOUTS], SAMPLE),
)
def test_every_layout_equals_one_process(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    one_process: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    rule: str,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches norms of a rank's fragment instead of the parameter, and ranks with different numbers of collectives."""
    pools[world_size].run(pretrain_case, optimizer_config(tmp_path, wordpiece_corpus, rule, ds_config))
    found = saved_tensors(checkpoint_path(tmp_path / "checkpoints", 3))
    assert found.keys() == one_process[rule].keys()
    assert distance(one_process[rule], found, "fp32") < 1e-6
    assert distance(one_process[rule], found, "exp_avg") < 1e-7
    index = json.loads((checkpoint_path(tmp_path / "checkpoints", 3) / "engine" / "index.json").read_text("utf-8"))
    sharded = sum(len(entry["fragments"]) > 1 for entry in index.values())
    assert (sharded > 0) == (world_size > 1 and not ds_config.endswith("0")), "the layout shards no parameter"


@pytest.mark.parametrize(
    ("rule", "world_size", "ds_config"),
    [
        ("lamb", 2, "bf16_zero1"),
        *soak(("stableadamw", 2, "fp32_zero2"), ("stableadamw", 1, "bf16_zero3")),
        *soak(("muon", 2, "bf16_zero3"), ("muon", 3, "fp16_zero2")),
    ],  # Muon: `test_a_run_resumes_at_another_layout`
)
def test_resumed_optimizers_equal_the_uninterrupted_ones(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, rule: str, world_size: int, ds_config: str
) -> None:
    """Catches moments, or the step counter of the bias correction, that are not saved or not restored."""
    trees = {
        name: optimizer_config(tmp_path / name, wordpiece_corpus, rule, ds_config)
        for name in ("uninterrupted", "resumed")
    }
    pools[world_size].run(any_precision_case, trees["uninterrupted"])
    assert pools[world_size].run(any_precision_case, trees["resumed"], 1)[0] == "stopped"
    pools[world_size].run(any_precision_case, trees["resumed"])
    one, other = (saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 3)) for name in trees)
    assert_same_tensors(one, other)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "uninterrupted")
