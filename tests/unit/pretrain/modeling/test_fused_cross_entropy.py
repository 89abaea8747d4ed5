"""The fused cross-entropy against torch's, in Triton's interpreter; and its kernel compiled for several devices."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batching.batch import IGNORED
from pretrain.modeling import fused_cross_entropy
from pretrain.modeling.fused_cross_entropy import linear_cross_entropy
from pretrain.plan.activations import Allocations
from pretrain.world import World
from rank_pool import RankPool
from runs import sampled, soak

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, of a gradient's norm


def draw(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, bias: bool) -> list[Tensor | None]:
    torch.manual_seed(rows)
    drawn = [torch.randn(rows, hidden), 0.3 * torch.randn(vocabulary, hidden), torch.randn(vocabulary)]
    return [tensor.to(dtype) for tensor in drawn[:2]] + [drawn[2].to(dtype) if bias else None]


def with_gradients(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Any]:
    return [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def compare_with_torch(
    _: World, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, ignored: slice, chunk_logits: int
) -> None:
    """Fails unless loss, correct predictions and gradients are those of torch in float64. A chunk has a multiple of 8
    rows: the interpreter takes milliseconds for each."""
    tensors = draw(*shape, dtype, bias)
    ours, exact = with_gradients(tensors, dtype), with_gradients(tensors, torch.float64)
    logits = F.linear(*exact)
    labels = torch.where(torch.arange(shape[0]) % 3 == 0, logits.argmax(1), torch.arange(shape[0]) % shape[2])
    labels[ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_cross_entropy, "_ROW_TILE", 8)
        patch.setattr(fused_cross_entropy, "_CHUNK_LOGITS", chunk_logits)
        loss, uncounted = linear_cross_entropy(*ours, labels)
        with torch.no_grad():
            same_loss, correct = linear_cross_entropy(*ours, labels)
    assert uncounted is None
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == same_loss.item()
    assert loss.item() == pytest.approx(expected.item(), rel=max(TOLERANCE[dtype] / 10, 1e-6), abs=1e-30)
    assert correct.item() == int((logits.argmax(1) == labels).sum())
    (0.37 * loss).backward()
    (0.37 * expected).backward()
    for one, other in zip(ours, exact, strict=True):
        if one is not None:
            assert one.grad.dtype == dtype
            assert (one.grad - other.grad).norm() <= TOLERANCE[dtype] * other.grad.norm()


SHAPES = {"one chunk": ((37, 12, 101), 2**26), "one row": ((1, 8, 2), 1), "two chunks": ((10, 7, 65), 1)}


@pytest.mark.parametrize(
    ("dtype", "bias", "shape"),
    sampled(
        itertools.product(TOLERANCE, (True, False), SHAPES),
        [
            (torch.float32, False, "one chunk"),
            (torch.float32, True, "one row"),
            (torch.float16, True, "two chunks"),
            (torch.bfloat16, False, "two chunks"),
        ],
    ),
)
def test_values_and_gradients_are_those_of_torch(
    interpreting_pools: dict[int, RankPool], dtype: torch.dtype, bias: bool, shape: str
) -> None:
    """Catches odd sizes that are read or written past their end, a chunk that overwrites another one, the gradient of
    fp16 that is not scaled back, and rows that do not count but have a gradient."""
    sizes, chunk_logits = SHAPES[shape]
    interpreting_pools[1].run(compare_with_torch, sizes, dtype, bias, slice(2, None, 5), chunk_logits)


def test_a_vocabulary_of_several_blocks(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches sums and maxima that are not carried from one block to the next."""
    interpreting_pools[1].run(compare_with_torch, (5, 8, 9001), torch.float32, True, slice(1, 2), 2**26)


@pytest.mark.parametrize("rows", [3, 12])
def test_only_ignored_rows(interpreting_pools: dict[int, RankPool], rows: int) -> None:
    """Catches 0/0, and a label of -100 that is used as an index."""
    interpreting_pools[1].run(compare_with_torch, (rows, 8, 33), torch.bfloat16, True, slice(None), 1)


def check_extreme_logits(_: World) -> None:
    weight, labels = torch.tensor([[3e4], [-3e4]], dtype=torch.float16), torch.tensor([0, 1])
    hidden = torch.ones(2, 1, dtype=torch.float16)
    loss, correct = linear_cross_entropy(hidden, weight, None, labels)
    assert (loss.item(), correct.item()) == (60000.0, 1)
    for broken in (torch.inf, torch.nan):
        loss, _ = linear_cross_entropy(torch.ones(1, 1), torch.tensor([[1.0], [broken]]), None, torch.tensor([0]))
        assert loss.isnan(), "health checks rely on it"


def test_extreme_logits(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches an exponential that overflows, and a loss that hides values that are not finite."""
    interpreting_pools[1].run(check_extreme_logits)


def check_frozen(_: World) -> None:
    for learns in range(3):
        tensors: Any = draw(6, 4, 10, torch.float32, bias=True)
        tensors[learns].requires_grad_()
        linear_cross_entropy(*tensors, torch.arange(6)).loss_sum.backward()
        assert [tensor.grad is not None for tensor in tensors] == [number == learns for number in range(3)]
    with torch.no_grad():
        loss, correct = linear_cross_entropy(*tensors, torch.arange(6))
    assert not loss.requires_grad
    assert not correct.requires_grad


def test_only_wanted_gradients_are_computed(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches a frozen embedding that gets a gradient, and an evaluation that computes gradients."""
    interpreting_pools[1].run(check_frozen)


def compile_kernel(
    _: World, capability: int, dtype: str, has_bias: bool, block: int, counts: bool, cache: Path
) -> set[str]:
    """What the kernel compiles to, without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pretrain.modeling.cross_entropy_kernel import _cross_entropy_kernel

    signature = {"logits": f"*{dtype}", "width": "i32", "columns": "i32", "bias": f"*{dtype}"}
    signature |= {"labels": "*i64", "losses": "*fp32", "correct": "*i32", "scale": "fp32"}
    constants: dict[str, Any] = {"IGNORED": IGNORED, "HAS_BIAS": has_bias, "WANTS_GRADIENT": not counts, "BLOCK": block}
    constants |= ({} if has_bias else {"bias": None}) | ({} if counts else {"correct": None})
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(_cross_entropy_kernel, signature=signature, constexprs=constants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        return set(compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm)


KERNELS = [
    (capability, dtype, has_bias, 4096)
    for capability in (70, 80, 90, 100)
    for dtype, has_bias in (("fp16", True), ("bf16", False), ("fp32", True))
]


@pytest.mark.parametrize(  # smaller blocks, of smaller vocabularies, compile faster
    ("capability", "dtype", "has_bias", "block"), [(80, "fp16", True, 512), *soak(*KERNELS)]
)
def test_the_kernel_compiles(
    pools: dict[int, RankPool], tmp_path: Path, capability: int, dtype: str, has_bias: bool, block: int
) -> None:
    """Catches code that only the interpreter accepts, for V100, A100, H100 and B200."""
    for counts in (False, True):
        (compiled,) = pools[1].run(compile_kernel, capability, dtype, has_bias, block, counts, tmp_path)
        assert "cubin" in compiled


def allocated_by_loss(_: World, shapes: dict[str, tuple[int, ...]], planned: bool) -> int:
    """Bytes that the loss allocates, at the highest use: as `deepcloze plan` counts, or as it runs."""
    device = "meta" if planned else "cpu"
    inputs = nn.ParameterDict({name: torch.randn(shape, device=device) for name, shape in shapes.items()})
    tensors = inputs["hidden"], inputs["weight"], inputs["bias"]
    labels = torch.zeros(shapes["hidden"][0], dtype=torch.int64, device=device)
    with Allocations(inputs, ()) as counted:
        loss = linear_cross_entropy(*tensors, labels).loss_sum
        gc.collect()  # Triton's interpreter leaves cycles that refer to its arguments
        loss.backward()
    return counted.peak.total


def test_the_plan_counts_what_the_loss_allocates(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches a tensor of the fused loss that `deepcloze plan` forgets, and one that is gone."""
    shapes = {"hidden": (64, 96), "weight": (1000, 96), "bias": (1000,)}
    real, planned = (interpreting_pools[1].run(allocated_by_loss, shapes, plan)[0] for plan in (False, True))
    assert planned == pytest.approx(real, rel=0.01)
    hidden, weight = (torch.empty(shapes[name], device="meta", requires_grad=True) for name in ("hidden", "weight"))
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    linear_cross_entropy(hidden, weight, None, labels).loss_sum.backward()
    assert (hidden.grad is None, weight.grad is None) == (False, False)
