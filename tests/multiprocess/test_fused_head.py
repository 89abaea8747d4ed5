"""The fused head at every ZeRO stage, with Triton's interpreter in place of a GPU."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import free_port, give_up
from runs import NO_DROPOUT, TINY, Tree, build_engine, microbatch, run_config, sampled
from waiting import LIMIT

pytest.importorskip("triton")

RANKS = 2
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


def connect_rank(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    from pretrain.engine.process_group import connect

    connect(timedelta(seconds=60), give_up)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function on two ranks, where Triton interprets its kernels."""
    port = free_port()
    pools = [
        ProcessPoolExecutor(1, get_context("spawn"), initializer=connect_rank, initargs=(rank, port))
        for rank in range(RANKS)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for started in [pool.submit(os.getpid) for pool in pools]:
            started.result(timeout=LIMIT)
    yield lambda case, *args: [
        running.result(timeout=LIMIT)
        for running in [pool.submit(case, World(rank, RANKS), *args) for rank, pool in enumerate(pools)]
    ]
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


def steps_case(world: World, tree: Tree, fused: bool) -> tuple[list[float], list[float]]:
    """The losses and gradient norms of a few steps of two microbatches."""
    from pretrain.modeling import masked_lm
    from pretrain.modeling.head import choose_fused_head, logits_head

    masked_lm.choose_head = choose_fused_head if fused else lambda *_: logits_head
    with fp16_supported():
        engine, _ = build_engine(world, tree)
    losses, norms = [], []
    for step in range(3):
        engine.begin_step(step, 0.01)
        losses += [engine.accumulate(microbatch(), 12, step, number).item() for number in range(2)]
        norms.append(float(engine.step().grad_norm))
    losses.append(engine.predict(microbatch()).loss_sum.item())
    engine.close()
    return losses, norms


@pytest.mark.parametrize(
    ("precision", "stage"),
    sampled(itertools.product(TOLERANCE, range(4)), [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("fp16", 1)]),
)
def test_the_fused_head_trains_like_one_that_keeps_logits(
    ranks: Callable[..., list[Any]], wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    """Catches weights that ZeRO 3 has not gathered, and gradients of tied embeddings that are lost or counted twice."""
    tree = run_config(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}", model__config=TINY | NO_DROPOUT)
    plain, fused = (ranks(steps_case, tree, choice) for choice in (False, True))
    for (losses, norms), (fused_losses, fused_norms) in zip(plain, fused, strict=True):
        assert precision == "fp16" or losses[0] != pytest.approx(losses[-1], rel=0.02), "it learns something"
        assert fused_losses == pytest.approx(losses, rel=TOLERANCE[precision])
        assert fused_norms == pytest.approx(norms, rel=10 * TOLERANCE[precision])
