"""The kernels of packed attention against attention with a mask, in Triton's interpreter; and compiled for several
devices."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from pretrain.world import World
from rank_pool import RankPool
from runs import sampled, soak

pytest.importorskip("triton")

CASES: dict[str, tuple[list[int], int, int, int | None, float]] = {
    # bounds of sequences, heads, dimensions, reach, dropout
    "a window in one block": ([0, 64], 1, 16, 5, 0.0),
    "blocks on both sides": ([0, 3, 140, 140], 2, 16, 20, 0.1),
    "ModernBERT's window": ([0, 150], 1, 64, 64, 0.0),
    "two blocks on each side": ([0, 10, 150], 1, 32, 100, 0.0),
    "a window wider than sequences": ([0, 20, 90], 1, 16, 2**31 - 1, 0.0),
    "whole sequences": ([0, 70, 71, 200], 2, 16, None, 0.0),
    "a multiple of blocks": ([0, 128, 128, 129], 1, 16, None, 0.5),
    "dropout": ([0, 70, 150, 150], 2, 16, None, 0.7),
}


def kept_weights(seeds: Tensor, slots: int, heads: int, dropout: float) -> Tensor:
    """bool [H, T, T], by numbers as the kernels compute them."""

    def draw(places: Tensor, seed: Tensor) -> Tensor:
        bits = (places * 0x9E3779B1 + seed) % 2**32
        return bits ^ (bits >> 16) | 1

    slot = torch.arange(slots)
    of_queries = draw(slot * heads + torch.arange(heads)[:, None], seeds[0])
    return of_queries[:, :, None] * draw(slot, seeds[1]) % 2**32 >= dropout * 2**32


def compare_with_mask(
    _: World, bounds: list[int], heads: int, dimensions: int, reach: int | None, dropout: float
) -> None:
    """Fails unless the output and the gradients are those of attention with a mask in float64."""
    from pretrain.modeling import varlen_attention as module

    slots = bounds[-1]
    torch.manual_seed(slots)
    packed = torch.randn(slots, 3, heads, dimensions).half()  # as a model's layer for all three computes them
    inputs = [tensor.detach().requires_grad_() for tensor in packed.unbind(1)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    generator = torch.get_rng_state()
    options = (cu_seqlens, int(cu_seqlens.diff().max()), dimensions**-0.5, dropout, reach)
    output = module.varlen_attention(*inputs, *options)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    position = torch.arange(slots)
    sequence = torch.searchsorted(cu_seqlens, position.int(), right=True)
    attends = sequence[:, None] == sequence
    if reach is not None:
        attends &= (position[:, None] - position).abs() <= reach
    scores = torch.einsum("thd,shd->hts", *exact[:2]) * dimensions**-0.5
    weights = scores.masked_fill(~attends, -torch.inf).softmax(-1)
    if dropout:
        torch.set_rng_state(generator)
        seeds = torch.empty(2, dtype=torch.int64).random_(-(2**63), None)
        weights = weights * kept_weights(seeds, slots, heads, dropout) / (1 - dropout)
    expected = torch.einsum("hts,shd->thd", weights, exact[2])

    upstream = torch.randn_like(output).transpose(0, 2).contiguous().transpose(0, 2)  # its dimensions are not together
    gradients = torch.autograd.grad(output, inputs, upstream)
    others = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((output, *gradients), (expected, *others), strict=True):
        assert float((one.detach() - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("case", sampled(CASES, ["blocks on both sides", "two blocks on each side", "dropout"]))
def test_output_and_gradients_are_those_of_attention_with_a_mask(
    interpreting_pools: dict[int, RankPool], case: str
) -> None:
    """Catches a window that is off by one, slots of other sequences or past the end, a block that is left out, strides
    of another tensor, and a backward pass with another mask of dropout."""
    interpreting_pools[1].run(compare_with_mask, *CASES[case])


def check_operators(_: World, dropout: float) -> None:
    """Fails unless both operators are as torch.compile needs them."""
    from pretrain.modeling import varlen_attention as module

    query, key, value, gradient = torch.randn(4, 10, 2, 16).half()
    options = (10, 0.25, dropout, -1)
    inputs = (query, key, value, torch.tensor([0, 10], dtype=torch.int32))
    saved = module._forward(*inputs, *options)
    for rotation in ((None, None), torch.randn(2, 10, 16).half()):
        torch.library.opcheck(module._backward, (gradient, *inputs, *saved, *rotation, *options))
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(module._forward, (*inputs, *options))


@pytest.mark.parametrize("dropout", sampled([0.0, 0.5], [0.0]))
def test_operators_can_be_compiled(interpreting_pools: dict[int, RankPool], dropout: float) -> None:
    """Catches shapes that differ in compiled code, and a result that was not computed."""
    interpreting_pools[1].run(check_operators, dropout)


def compare_qkv_attention(_: World, rotates: bool, dropout: float) -> None:
    """Fails unless one tensor for query, key and value gives what three do, after rotary positions."""
    from pretrain.modeling import varlen_attention as module

    bounds = [0, 70, 70, 90] if rotates else [0, 20, 20, 30]  # positions of the second block are rotated, too
    qkv = torch.randn(bounds[-1], 3, 2, 16).half().requires_grad_()
    angles = torch.randn(bounds[-1], 8).repeat(1, 2)
    rotation = (angles.cos().half(), angles.sin().half()) if rotates else None
    options = (torch.tensor(bounds, dtype=torch.int32), bounds[1], 0.25, dropout, None)
    generator = torch.get_rng_state()
    output = module.varlen_qkv_attention(qkv, rotation, *options)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, qkv, upstream)

    query, key, value = qkv.unbind(1)
    if rotation is not None:
        query, key = apply_rotary_pos_emb(query, key, *rotation, unsqueeze_dim=1)
    torch.set_rng_state(generator)
    expected = module.varlen_attention(query, key, value, *options)
    (other,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradient, other, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("rotates", "dropout"), [(True, 0.0), (False, 0.3)])
def test_one_tensor_for_query_key_and_value(
    interpreting_pools: dict[int, RankPool], rotates: bool, dropout: float
) -> None:
    """Catches gradients in the place of others, and rotary positions that are undone the wrong way."""
    interpreting_pools[1].run(compare_qkv_attention, rotates, dropout)


def compare_distant_heads(_: World) -> None:
    from pretrain.modeling import varlen_attention as module

    near = torch.randn(10, 3, 16).half()
    far = torch.empty_strided(near.shape, (16, 2**30 + 16, 1), dtype=near.dtype)  # 4 GiB, of which a few pages are used
    far.copy_(near)
    options = (torch.tensor([0, 4, 10], dtype=torch.int32), 6, 0.25, 0.0, None)
    expected = module.varlen_attention(near, near, near, *options)
    assert torch.equal(module.varlen_attention(near, far, near, *options), expected)


def test_heads_may_be_far_apart(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches offsets that overflow in 32 bits: with many slots, where rotary positions leave the heads outside."""
    interpreting_pools[1].run(compare_distant_heads)


def test_weights_are_dropped_independently() -> None:
    """Catches masks that repeat in rows, columns or heads: their correlations vary as those of random bits do."""
    size, heads, dropout = 256, 2, 0.1
    torch.manual_seed(0)
    for _ in range(5):
        seeds = torch.empty(2, dtype=torch.int64).random_(-(2**63), None)
        kept = kept_weights(seeds, size, heads, dropout).double()
        masks = (kept - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5
        assert abs(masks.mean()) * size * heads**0.5 < 4
        for rows in (masks.flatten(0, 1), masks.transpose(1, 2).flatten(0, 1)):
            products = (rows @ rows.T)[*torch.triu_indices(len(rows), len(rows), 1)] / size**0.5
            assert products.var().item() == pytest.approx(1, abs=0.05)
            assert products.abs().max() < 7


def compile_kernels(_: World, capability: int, dtype: str, dimensions: int, cache: Path) -> list[set[str]]:
    """What the kernels compile to, without a device. With less than 64 dimensions: each line of them once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pretrain.modeling import varlen_attention as module

    kinds = {"bounds": "*i32", "seeds": "*i64", "logsumexp": "*fp32", "deltas": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("slots", "heads", "blocks"), "i32")
    kernels = {
        module.forward_kernel: module._FORWARD,
        module.backward_query_kernel: module._BACKWARD_QUERIES,
        module.backward_key_kernel: module._BACKWARD_KEYS | (module._REGISTERS if capability == 90 else {}),
    }
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        for (kernel, options), reach in itertools.product(kernels.items(), (-1, 64)):
            if dimensions < 64 and reach < 0 and kernel is not module.forward_kernel:
                continue
            blocks = {name: options[name] for name in ("QUERIES", "KEYS")}
            constants = blocks | {"DIMENSIONS": dimensions, "DROPPED": round(0.1 * 2**32), "REACH": reach}
            if "ROTATES" in kernel.arg_names:
                constants["ROTATES"] = reach > 0
            names = [name for name in kernel.arg_names if name not in constants]
            is_stride = {name: name.endswith(("_slots", "_heads")) for name in names}
            signature = {name: kinds.get(name, "i32" if is_stride[name] else f"*{dtype}") for name in names}
            source = ASTSource(
                kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
            )
            others = {name: value for name, value in options.items() if name not in blocks}
            compiled.append(set(compile(source, target=GPUTarget("cuda", capability, 32), options=others).asm))
    return compiled


@pytest.mark.parametrize(
    ("capability", "dtype", "dimensions"),
    [(90, "bf16", 16), *soak((80, "fp16", 64), (90, "bf16", 64), (100, "bf16", 64))],  # fewer dimensions compile faster
)
def test_the_kernels_compile(
    pools: dict[int, RankPool], tmp_path: Path, capability: int, dtype: str, dimensions: int
) -> None:
    """Catches code that only the interpreter accepts, for A100, H100 and B200."""
    (compiled,) = pools[1].run(compile_kernels, capability, dtype, dimensions, tmp_path)
    assert all("cubin" in kernel for kernel in compiled)
