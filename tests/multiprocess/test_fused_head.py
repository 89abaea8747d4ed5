"""The fused head at every ZeRO stage, with Triton's interpreter in place of a GPU."""

import itertools
from pathlib import Path

import pytest

from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, SHALLOW, Tree, build_engine, microbatch, run_config, sampled

pytest.importorskip("triton")

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


def steps_case(world: World, tree: Tree, fused: bool) -> tuple[list[float], list[float]]:
    """The losses and gradient norms of a few steps of two microbatches."""
    from pretrain.modeling import masked_lm
    from pretrain.modeling.head import choose_fused_head, gpu_losses, logits_head

    masked_lm.choose_head = lambda model: choose_fused_head(model, gpu_losses) if fused else logits_head
    with fp16_supported():
        engine, _ = build_engine(world, tree)
    losses, norms = [], []
    for step in range(3):
        engine.begin_step(step, 0.01)
        losses += [engine.accumulate(microbatch(), 12, step, number).item() for number in range(2)]
        norms.append(engine.step().wait().grad_norm)
    losses.append(engine.predict(microbatch()).loss_sum.item())
    engine.close()
    return losses, norms


@pytest.mark.parametrize(
    ("precision", "stage"),
    sampled(itertools.product(TOLERANCE, range(4)), [("fp32", 3)]),  # 16 bit: tests/simulated_gpu
)
def test_the_fused_head_trains_like_one_that_keeps_logits(
    interpreting_pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    """Catches weights that ZeRO 3 has not gathered, and gradients of tied embeddings that are lost or counted twice."""
    tree = run_config(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}", model__config=SHALLOW | NO_DROPOUT)
    plain, fused = (interpreting_pools[2].run(steps_case, tree, choice) for choice in (False, True))
    for (losses, norms), (fused_losses, fused_norms) in zip(plain, fused, strict=True):
        assert precision == "fp16" or losses[0] != pytest.approx(losses[-1], rel=0.02), "it learns something"
        assert fused_losses == pytest.approx(losses, rel=TOLERANCE[precision])
        assert fused_norms == pytest.approx(norms, rel=10 * TOLERANCE[precision])
