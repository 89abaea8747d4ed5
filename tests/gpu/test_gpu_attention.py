"""Packed attention on a GPU equals that on the CPU, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.modeling.attention import Packing, packed_attention

LENGTHS = [(13, 40, 7), (64,), (1, 1, 50)]  # of the sequences in each row of 64 slots; the rest is padding
WIDTH = 64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def boundaries() -> tuple[Tensor, Tensor]:
    """Segments and boundaries (cu_seqlens) of the rows, as in a microbatch."""
    segments = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int32)
    bounds = [0]
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            segments[row, start : start + length] = number + 1
            start += length
            bounds.append(row * WIDTH + start)
        if start < WIDTH:
            bounds.append((row + 1) * WIDTH)
    return segments, torch.tensor(bounds, dtype=torch.int32)


def attend(device: str, dtype: torch.dtype, sliding_window: int | None) -> list[Tensor]:
    """Output and gradients of query, key and value at real slots, copied to the CPU in fp32."""
    segments, cu_seqlens = boundaries()
    draw = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), 4, WIDTH, 32)
    inputs = [torch.randn(shape, generator=draw).to(dtype) for _ in range(3)]
    weights = torch.randn(len(LENGTHS), WIDTH, 4, 32, generator=draw) * (segments > 0)[:, :, None, None]
    leaves: list[Any] = [tensor.to(device).requires_grad_() for tensor in inputs]
    output, _ = packed_attention(
        nn.Module(),
        *leaves,
        None,
        packing=Packing(segments.to(device), cu_seqlens.to(device)),
        sliding_window=sliding_window,
    )
    (output.float() * weights.to(device)).sum().backward()
    real = (segments > 0)[:, :, None, None]
    gradients = [leaf.grad.float().cpu().transpose(1, 2) * real for leaf in leaves]
    return [output.detach().float().cpu() * real, *gradients]


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_kernels_agree_with_the_cpu(dtype: torch.dtype, sliding_window: int | None) -> None:
    """Catches boundaries that are off by one, a wrong local window, and a wrong scale."""
    expected = attend("cpu", torch.float32, sliding_window)
    found = attend("cuda", dtype, sliding_window)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_uses_flash_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches attention with a mask, which is slow, where flash attention is available."""
    from pretrain.modeling import attention

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("attention with a mask")

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", refuse)
    attend("cuda", dtype, None)
