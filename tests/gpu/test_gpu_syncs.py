"""The host does not wait for the GPU in a microbatch, and at most once in a step.

torch reports operations that synchronize; those of NCCL and of the CPU's own threads are not among them.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import MODEL, gpu_run

from pretrain.batching.batch import Microbatch
from pretrain.world import World
from runs import Tree, build_engine, microbatch

WITH_DROPOUT = MODEL | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WARMUP = 3  # steps that create the optimizer's state, compile kernels and look up the device


def syncs_case(
    world: World, tree: Tree, norm_limit: float, compiled: bool = False
) -> tuple[list[str], list[list[str]], int]:
    """Where the host waits in the microbatches of some steps, and in the rest of each of these steps; and how often it
    may wait there: not at all if the GPU decides on updates."""
    engine, _ = build_engine(world, tree, compiled=compiled)
    pinned = Microbatch(*(tensor.pin_memory() for tensor in microbatch()))
    in_microbatches: list[str] = []
    in_steps: list[list[str]] = []
    for step in range(WARMUP + 3):
        measured = step >= WARMUP
        engine.begin_step(step, 1e-4)
        for number in range(3):
            found = reported_syncs(lambda number=number, step=step: engine.accumulate(pinned, 9, step, number))
            in_microbatches += found if measured else []
        found = reported_syncs(lambda: engine.step(norm_limit).wait())
        if measured:
            in_steps.append(found)
    engine.close()
    return in_microbatches, in_steps, int(not engine.runs_ahead)


def reported_syncs(call: Any) -> list[str]:
    """Where a call waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{warning.filename}:{warning.lineno}" for warning in caught if "synchronizing CUDA" in str(warning.message)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("rule", ["adamw", "lamb", "muon"])
def test_at_most_one_sync_per_step_and_none_in_a_microbatch(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, rule: str, precision: str, stage: int
) -> None:
    """Catches `.item()`, `float(tensor)`, boolean indexing and copies of unpinned memory on the path of a step: the GPU
    would run dry."""
    tree = gpu_run(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}", model__config=WITH_DROPOUT)
    tree["optimizer"] = {"name": rule, "lr": 3e-3}
    for in_microbatches, in_steps, most in gpus.run(syncs_case, tree, 1e6):
        assert in_microbatches == []
        assert all(len(found) <= most for found in in_steps), in_steps


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiled_layers_add_no_sync(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int, checkpointing: bool
) -> None:
    """Catches compiled code that reads sizes from the GPU, with flash attention and with a mask."""
    tree = gpu_run(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}", model__config=WITH_DROPOUT)
    tree["model"]["activation_checkpointing"] = checkpointing
    for in_microbatches, in_steps, most in gpus.run(syncs_case, tree, 1e6, True):
        assert in_microbatches == []
        assert all(len(found) <= most for found in in_steps), in_steps


def test_a_sync_is_reported() -> None:
    """Catches a test that would pass although the host waits."""
    value = torch.ones(3, device="cuda")
    assert reported_syncs(lambda: value * 2) == []
    assert len(reported_syncs(lambda: value.sum().item())) == 1
    assert len(reported_syncs(lambda: value[value > 0])) == 1
