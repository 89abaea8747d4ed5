"""The fused head on a GPU: values, gradients and memory, alone and in runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_runs import gpu_run
from torch import Tensor

from pretrain.batching.batch import IGNORED
from pretrain.modeling import fused_cross_entropy, head, masked_lm
from pretrain.modeling.head import fused_head, logits_head
from pretrain.world import World
from runs import Tree, build_engine, logged, microbatch, pretrain_case

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RELATIVE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 5e-3}  # of losses


def draw(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, which require gradients, and labels."""
    torch.manual_seed(3)
    shapes_and_scales = (((rows, hidden), 1.0), ((vocabulary, hidden), hidden**-0.5), ((vocabulary,), 0.1))
    inputs = [(scale * torch.randn(shape, device="cuda")).to(dtype) for shape, scale in shapes_and_scales]
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    labels[1::9] = IGNORED
    hidden_states, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    return hidden_states, weight, bias, labels


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(3000, 768, 30522), (1, 64, 50368), (5000, 128, 201)])
def test_values_and_gradients_are_those_of_torch(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Catches what Triton's interpreter cannot show: races in a block, products of rows that are not aligned, and
    sums that are rounded to 16 bit on the way."""
    *inputs, labels = draw(rows, hidden, vocabulary, dtype)
    loss, _ = fused_cross_entropy.linear_cross_entropy(*inputs, labels)
    with torch.no_grad():
        _, correct = fused_cross_entropy.linear_cross_entropy(*inputs, labels)
    (1e-3 * loss).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = F.linear(*exact)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    (1e-3 * expected).backward()
    tolerance = TOLERANCE[dtype] * (2 if rows == 1 else 1)  # of one row, roundings of logits do not cancel each other
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert abs(correct.item() - int((logits.argmax(1) == labels).sum())) <= 0.01 * rows
    for one, other in zip(inputs, exact, strict=True):
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < tolerance


def test_all_rows_ignored() -> None:
    """Catches NaN from a microbatch without masked tokens."""
    *inputs, labels = draw(64, 32, 1000, torch.bfloat16)
    labels.fill_(IGNORED)
    loss, _ = fused_cross_entropy.linear_cross_entropy(*inputs, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


def test_logits_are_not_kept() -> None:
    """Catches memory that grows with the logits [M, V]."""
    *inputs, labels = draw(16_384, 256, 50_368, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_cross_entropy.linear_cross_entropy(*inputs, labels).loss_sum.backward()
    logits = labels.numel() * inputs[1].shape[0] * 2
    assert torch.cuda.max_memory_allocated() - before < 0.4 * logits


def run_case(world: World, tree: Tree, plain: bool) -> str:
    """A run; `plain`: with logits."""
    if plain:
        masked_lm.choose_head = lambda *_: logits_head
    try:
        return pretrain_case(world, tree)
    finally:
        masked_lm.choose_head = head.choose_head


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_runs_with_the_fused_head_follow_those_with_logits(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    """Catches gradients of tied embeddings that are lost or counted twice, weights that ZeRO 3 has not gathered, and a
    loss scale that is applied twice."""
    for plain in (False, True):
        tree = gpu_run(tmp_path / str(plain), wordpiece_corpus, f"{precision}_zero{stage}", schedule__steps=8)
        assert set(gpus.run(run_case, tree, plain)) == {"done"}
    assert logged(tmp_path / "False") == pytest.approx(logged(tmp_path / "True"), rel=RELATIVE[precision])


def head_case(world: World, tree: Tree) -> tuple[str, float, float]:
    """The kind of head that a model on this rank gets, and its loss in training and evaluation."""
    engine, _ = build_engine(world, tree)
    engine.begin_step(0, 0.0)
    loss = engine.accumulate(microbatch(), 3, 0, 0).item()
    engine.step()
    evaluated = engine.predict(microbatch()).loss_sum.item()
    kind = getattr(engine._deepspeed.module._head, "func", logits_head).__name__
    engine.close()
    return kind, loss, evaluated


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_on_a_gpu_gets_the_fused_head(gpus: Any, wordpiece_corpus: Path, tmp_path: Path, stage: int) -> None:
    """Catches a probe or a trial of the kernel that fails, and logits that are kept for that reason."""
    for kind, loss, evaluated in gpus.run(head_case, gpu_run(tmp_path, wordpiece_corpus, f"bf16_zero{stage}")):
        assert kind == fused_head.__name__
        assert loss == pytest.approx(evaluated, rel=1e-2)
