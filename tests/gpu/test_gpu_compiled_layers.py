"""Training on GPUs with compiled layers, which are the default there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import MODEL, gpu_run
from packaging.version import Version

from pretrain.world import World
from runs import Tree, logged, pretrain_case

STEPS = 8
# The part of the last layer is compiled again for an input that is no view: with ZeRO 3 in torch 2.11, it is one in the
# forward pass, but not when activation checkpointing computes the layer again.
COMPILED_AGAIN = Version(torch.__version__).release < (2, 13)
RELATIVE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}  # fused operations round less often


def graphs_case(world: World, tree: Tree, stop_after: int | None = None) -> tuple[str, int]:
    """A run. Returns its outcome, and how many graphs were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outcome = pretrain_case(world, tree, stop_after)
    return outcome, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_compiled_layers_follow_layers_as_they_are(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int, checkpointing: bool
) -> None:
    """Catches compiled code with other results, layers that are not compiled, and a graph for each layer or shape; in
    16 bit with flash attention, in fp32 with a mask."""
    for compiled in (False, True):
        tree = gpu_run(tmp_path / str(compiled), wordpiece_corpus, f"{precision}_zero{stage}", schedule__steps=STEPS)
        tree["engine"]["compile"] = compiled
        tree["model"]["activation_checkpointing"] = checkpointing
        again = stage == 3 and checkpointing and COMPILED_AGAIN
        graphs = 2 + again if compiled else 0  # of the layers, and of the first part of the last one
        assert set(gpus.run(graphs_case, tree)) == {("done", graphs)}
    plain, compiled_losses = (logged(tmp_path / name) for name in ("False", "True"))
    assert compiled_losses == pytest.approx(plain, rel=RELATIVE[precision])


@pytest.mark.parametrize("ds_config", ["fp32_zero1", "bf16_zero1", "bf16_zero3"])
def test_a_compiled_run_resumes(gpus: Any, wordpiece_corpus: Path, tmp_path: Path, ds_config: str) -> None:
    """Catches dropout masks of compiled code that depend on the attempt. Flash attention adds in any order."""
    for name, stop_after in (("uninterrupted", None), ("stopped", 4)):
        tree = gpu_run(tmp_path / name, wordpiece_corpus, ds_config, schedule__steps=STEPS, model__config=MODEL)
        tree["engine"]["compile"] = True
        ended = gpus.run(graphs_case, tree, stop_after)
        if stop_after is not None:
            assert {outcome for outcome, _ in ended} == {"stopped"}
            ended = gpus.run(graphs_case, tree)
        assert {outcome for outcome, _ in ended} == {"done"}
    assert logged(tmp_path / "stopped") == pytest.approx(logged(tmp_path / "uninterrupted"), rel=1e-3)
