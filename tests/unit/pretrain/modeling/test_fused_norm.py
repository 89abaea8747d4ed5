"""Norms beside residual connections, in Triton's interpreter; and compiled for several devices."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.world import World
from rank_pool import RankPool
from runs import soak

pytest.importorskip("triton")

COLUMNS = 48  # not a power of 2
PROGRAMS = 3  # the interpreter takes milliseconds for each
ROWS = 301  # more than these compute at once, and not a multiple of their rows


def compare(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 3e-3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).half().requires_grad_()


def random_norm(bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(COLUMNS, bias=bias).half()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], upstreams: list[Tensor]) -> tuple[Tensor, ...]:
    upstreams = [upstream.to(output.dtype) for upstream, output in zip(upstreams, outputs, strict=True)]
    return (*outputs, *torch.autograd.grad(outputs, leaves, upstreams))


def check_after_dropout(_: World, dropout: float, twice: bool) -> None:
    from pretrain.modeling import fused_norm as module

    torch.manual_seed(0)
    norm, values, residual, bias = random_norm(), draw(1, ROWS, COLUMNS), draw(1, ROWS, COLUMNS), draw(COLUMNS)
    upstreams = list(torch.randn(1 + twice, 1, ROWS, COLUMNS).half())
    numbers, draw_numbers = [], module.odd_numbers

    def recorded(like: Tensor) -> Tensor:
        numbers.append(draw_numbers(like))
        return numbers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PROGRAMS", PROGRAMS)
        patch.setattr(module, "odd_numbers", recorded)
        outputs = module.dropout_add_norm(values, bias, dropout, residual, norm, twice)
        found = gradients(outputs, [values, residual, bias, norm.weight, norm.bias], upstreams)

    exact: list[Any] = [tensor.detach().double().requires_grad_() for tensor in (values, residual, bias)]
    weights = [parameter.detach().double().requires_grad_() for parameter in norm.parameters()]
    kept: Any = 1.0
    if dropout:
        (of_all,) = numbers
        assert bool((of_all % 2 == 1).all())
        kept = module.drop(torch.ones(1, ROWS, COLUMNS), of_all, dropout).double()
        assert abs(float((kept == 0).double().mean()) - dropout) < 0.03
    shifted = exact[0] + exact[2] - exact[2].detach()  # values include the bias
    output = F.layer_norm(shifted * kept + exact[1], (COLUMNS,), *weights)
    compare(gradients((output,) * (1 + twice), exact + weights, upstreams), found)


@pytest.mark.parametrize(("dropout", "twice"), [(0.3, True), (0.0, True), (0.3, False)])
def test_norm_after_dropout(interpreting_pools: dict[int, RankPool], dropout: float, twice: bool) -> None:
    """Catches rows that are left out, another mask in the backward pass, and gradients in the place of others."""
    interpreting_pools[1].run(check_after_dropout, dropout, twice)


def check_beside_residual(_: World, bias: bool) -> None:
    from pretrain.modeling import fused_norm as module

    torch.manual_seed(0)
    norm, values = random_norm(bias), draw(1, ROWS, COLUMNS)
    upstreams = list(torch.randn(2, 1, ROWS, COLUMNS).half())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PROGRAMS", PROGRAMS)
        outputs = module.norm_beside_residual(values, norm)
        found = gradients(outputs, [values, *norm.parameters()], upstreams)
    exact = values.detach().double().requires_grad_()
    weights = [parameter.detach().double().requires_grad_() for parameter in norm.parameters()]
    output = F.layer_norm(exact, (COLUMNS,), *weights)
    compare(gradients((output, exact.view_as(exact)), [exact, *weights], upstreams), found)


@pytest.mark.parametrize("bias", [False, True])
def test_norm_beside_residual(interpreting_pools: dict[int, RankPool], bias: bool) -> None:
    """Catches the gradient of the residual connection inside of the norm's, and sums of a parameter in the place of
    another's."""
    interpreting_pools[1].run(check_beside_residual, bias)


def check_operator(_: World) -> None:
    from pretrain.modeling import fused_norm as module

    values = torch.randn(3, 40, 20).half()
    rows = torch.randn(2, 40)
    inputs = (values[2], *rows, torch.randn(20).half())
    numbers = torch.randint(-(2**31), 2**31, (60,), dtype=torch.int32) | 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PROGRAMS", PROGRAMS)
        torch.library.opcheck(module._backward, (values[0], values[1], 1, *inputs, numbers, 0.1, 3))
        torch.library.opcheck(module._backward, (values[0], None, 0, *inputs, None, 0.0, 1))


def test_operator_can_be_compiled(interpreting_pools: dict[int, RankPool]) -> None:
    """Catches shapes that differ in compiled code."""
    interpreting_pools[1].run(check_operator)


def compile_kernel(_: World, capability: int, dtype: str, widths: tuple[int, ...], cache: Path) -> list[set[str]]:
    """What the kernel compiles to, without a device: after dropout, and beside a residual connection."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pretrain.modeling.fused_norm import _WARPS, _backward_kernel, rows_at_once

    kinds = {"numbers": "*i32", "kept_scale": "fp32"} | dict.fromkeys(("rows", "columns", "smallest_kept"), "i32")
    kinds |= dict.fromkeys(("means", "scales", "sums"), "*fp32")
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        for (other_of, drops, parts), columns in itertools.product(((1, True, 3), (2, False, 1)), widths):
            constants = {"OTHER_OF": other_of, "DROPS": drops, "PARTS": parts}
            constants |= {"ROWS": rows_at_once(columns, parts), "COLUMNS": columns}
            names = [name for name in _backward_kernel.arg_names if name not in constants]
            signature = {name: kinds.get(name, f"*{dtype}") for name in names} | dict.fromkeys(constants, "constexpr")
            source = ASTSource(_backward_kernel, signature=signature, constexprs=constants)
            target = GPUTarget("cuda", capability, 32)
            compiled.append(set(compile(source, target=target, options={"num_warps": _WARPS}).asm))
    return compiled


DEVICES = [(70, "fp16"), (80, "fp16"), (90, "bf16"), (100, "bf16")]


@pytest.mark.parametrize(
    ("capability", "dtype", "widths"), [(90, "bf16", (128,)), *soak(*[(*device, (1024, 2048)) for device in DEVICES])]
)
def test_the_kernel_compiles(
    pools: dict[int, RankPool], tmp_path: Path, capability: int, dtype: str, widths: tuple[int, ...]
) -> None:
    """Catches code that only the interpreter accepts."""
    (compiled,) = pools[1].run(compile_kernel, capability, dtype, widths, tmp_path)
    assert all("cubin" in kernel for kernel in compiled)
