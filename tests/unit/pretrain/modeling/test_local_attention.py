"""The kernels of attention in a local window against attention with a mask, in Triton's interpreter; and compiled for
several devices."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.world import World
from rank_pool import RankPool
from runs import sampled

pytest.importorskip("triton")

CASES = {  # slots, heads, dimensions, reach
    "a window in one block": (64, 1, 16, 5),
    "blocks on both sides": (200, 2, 16, 20),
    "ModernBERT's window": (150, 1, 64, 64),
    "two blocks on each side": (140, 2, 32, 100),
}


def compare_with_mask(_: World, slots: int, heads: int, dimensions: int, reach: int) -> None:
    """Fails unless the output and the gradients are those of attention with a mask in float64."""
    from pretrain.modeling.local_attention import local_attention

    torch.manual_seed(slots)
    packed = torch.randn(slots, 3, heads, dimensions).half()  # as a model's layer for all three computes them
    inputs = [tensor.detach().requires_grad_() for tensor in packed.unbind(1)]
    segments = (torch.rand(slots) < 0.03).cumsum(0).int()
    output = local_attention(*inputs, segments, dimensions**-0.5, reach)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    position = torch.arange(slots)
    attends = (segments[:, None] == segments) & ((position[:, None] - position).abs() <= reach)
    scores = torch.einsum("thd,shd->hts", *exact[:2]) * dimensions**-0.5
    expected = torch.einsum("hts,shd->thd", scores.masked_fill(~attends, -torch.inf).softmax(-1), exact[2])

    upstream = torch.randn_like(output).transpose(0, 2).contiguous().transpose(0, 2)  # its dimensions are not together
    gradients = torch.autograd.grad(output, inputs, upstream)
    others = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((output, *gradients), (expected, *others), strict=True):
        assert float((one.detach() - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("case", sampled(CASES, ["blocks on both sides", "two blocks on each side"]))
def test_output_and_gradients_are_those_of_attention_with_a_mask(
    interpreting_pools: dict[int, RankPool], case: str
) -> None:
    """Catches a window that is off by one, slots of other segments or past the end, a block that is left out, and
    strides of another tensor."""
    interpreting_pools[1].run(compare_with_mask, *CASES[case])


def compile_kernels(_: World, capability: int, dtype: str, cache: Path) -> list[set[str]]:
    """What the kernels compile to, without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pretrain.modeling import local_attention as module

    kinds = {"segments": "*i32", "sums": "*fp32", "products": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("length", "heads"), "i32")
    constants: dict[str, Any] = {"REACH": 64, "DIMENSIONS": 64, "BLOCK": 64}
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        for kernel in (module._forward_kernel, module._query_kernel, module._key_kernel):
            names = [name for name in kernel.arg_names if name not in constants]
            is_stride = {name: name.endswith(("_slots", "_heads")) for name in names}
            signature = {name: kinds.get(name, "i32" if is_stride[name] else f"*{dtype}") for name in names}
            source = ASTSource(
                kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
            )
            target = GPUTarget("cuda", capability, 32)
            compiled.append(set(compile(source, target=target, options=module._OPTIONS).asm))
    return compiled


@pytest.mark.parametrize(("capability", "dtype"), sampled([(80, "fp16"), (90, "bf16"), (100, "bf16")], [(90, "bf16")]))
def test_the_kernels_compile(pools: dict[int, RankPool], tmp_path: Path, capability: int, dtype: str) -> None:
    """Catches code that only the interpreter accepts, for A100, H100 and B200."""
    (compiled,) = pools[1].run(compile_kernels, capability, dtype, tmp_path)
    assert all("cubin" in kernel for kernel in compiled)
