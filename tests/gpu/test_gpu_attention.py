"""Packed attention on a GPU: all kernels compute what the CPU does, forward and backward; dropout drops its share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from experiment.models.dropout import use_fast_dropout
from pretrain.modeling import attention
from pretrain.modeling.attention import (
    Packing,
    VarlenKernels,
    choose_varlen_kernels,
    flash_attention,
    masked_attention,
    packed_attention,
    supports_flash,
)

LENGTHS = [(13, 40, 7), (64,), (1, 1, 50)]  # of the sequences in each row of 64 slots; the rest is padding
WIDTH, HEADS, SIZE = 64, 4, 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIXTEEN_BIT = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
DROPOUT = 0.1


@pytest.fixture
def _flash() -> None:
    if not supports_flash(torch.cuda.get_device_capability(), SIZE, torch.float16):
        pytest.skip("this device has no flash attention")


def boundaries() -> tuple[Tensor, Tensor]:
    """Segments and boundaries (cu_seqlens) of the rows, as in a microbatch."""
    segments = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int32)
    bounds = [0]
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            segments[row, start : start + length] = len(bounds)
            start += length
            bounds.append(row * WIDTH + start)
        if start < WIDTH:
            bounds.append((row + 1) * WIDTH)
    return segments, torch.tensor(bounds, dtype=torch.int32)


def attend(
    device: str,
    dtype: torch.dtype,
    sliding_window: int | None,
    *,
    flat: bool = False,
    dropout: float = 0.0,
    varlen: VarlenKernels | None = None,
) -> list[Tensor]:
    """Output and gradients of query, key and value at real slots, copied to the CPU in fp32. `flat`: as one row of all
    slots, with boundaries that repeat the last one."""
    segments, cu_seqlens = boundaries()
    draw = torch.Generator().manual_seed(5)
    inputs = [torch.randn(len(LENGTHS), WIDTH, HEADS, SIZE, generator=draw).to(dtype) for _ in range(3)]
    weights = torch.randn(len(LENGTHS), WIDTH, HEADS, SIZE, generator=draw) * (segments > 0)[:, :, None, None]
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
    rows = [leaf.flatten(0, 1)[None] if flat else leaf for leaf in leaves]
    if flat:
        segments, cu_seqlens = segments.view(1, -1), torch.cat([cu_seqlens, cu_seqlens[-1:].repeat(5)])
    packing = Packing(segments.to(device), cu_seqlens.to(device), max_length=WIDTH, varlen=varlen)
    query, key, value = (tensor.transpose(1, 2) for tensor in rows)
    options: Any = {"packing": packing, "sliding_window": sliding_window, "dropout": dropout}
    output, _ = packed_attention(nn.Module(), query, key, value, None, **options)
    output = output.reshape(len(LENGTHS), WIDTH, HEADS, SIZE)
    (output.float() * weights.to(device)).sum().backward()
    real = (boundaries()[0] > 0)[:, :, None, None]
    gradients = [leaf.grad.float().cpu() * real for leaf in leaves if leaf.grad is not None]
    return [output.detach().float().cpu() * real, *gradients]


def assert_close_to_cpu(found: list[Tensor], dtype: torch.dtype, sliding_window: int | None) -> None:
    expected = attend("cpu", torch.float32, sliding_window)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_kernels_agree_with_the_cpu(dtype: torch.dtype, sliding_window: int | None) -> None:
    """Catches boundaries that are off by one, a wrong local window, and a wrong scale."""
    assert_close_to_cpu(attend("cuda", dtype, sliding_window), dtype, sliding_window)


@SIXTEEN_BIT
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_a_mask_agrees_with_the_cpu(
    dtype: torch.dtype, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mask that devices without flash attention cannot use, such as a V100."""
    monkeypatch.setattr(attention, "supports_flash", lambda *_: False)
    assert_close_to_cpu(attend("cuda", dtype, sliding_window), dtype, sliding_window)


@SIXTEEN_BIT
@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.usefixtures("_flash")
def test_one_flat_row_agrees_with_the_cpu(dtype: torch.dtype, sliding_window: int | None) -> None:
    """Catches slots that are not computed, and empty sequences at the end of the boundaries."""
    assert_close_to_cpu(attend("cuda", dtype, sliding_window, flat=True), dtype, sliding_window)


@SIXTEEN_BIT
@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.usefixtures("_flash")
def test_our_own_kernel_agrees_with_the_cpu(
    dtype: torch.dtype, sliding_window: int | None, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kernel that does not compile, that computes something else than in the interpreter, or that is not
    used."""
    kernels = own_kernels(dtype)
    monkeypatch.setattr(Packing, "prefers_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "flash_attention_2", None)
    found = attend("cuda", dtype, sliding_window, flat=flat, varlen=kernels)
    assert_close_to_cpu(found, dtype, sliding_window)


def own_kernels(dtype: torch.dtype) -> VarlenKernels:
    config, device = AutoConfig.for_model("modernbert"), torch.device("cuda")
    kernels = choose_varlen_kernels(config, device, dtype, has_windows=True)
    assert kernels is not None
    return kernels


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@SIXTEEN_BIT
@pytest.mark.usefixtures("_flash")
def test_16_bit_uses_flash_attention(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches attention with a mask, which is slow, where flash attention is available."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("attention with a mask")

    monkeypatch.setattr(attention, "masked_attention", refuse)
    attend("cuda", dtype, None, dropout=dropout)


def kernel_with_dropout(name: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel with attention dropout, as a function of query, key and value [B, H, W, D]."""
    segments, cu_seqlens = (tensor.cuda() for tensor in boundaries())
    packing = Packing(segments, cu_seqlens)
    use_fast_dropout(nn.Module())  # as for a model
    if name != "masked":
        kernel = own_kernels(dtype).attend if name == "ours" else None
        return lambda query, key, value: flash_attention(query, key, value, packing, SIZE**-0.5, DROPOUT, None, kernel)
    bias = packing.bias(None, dtype)
    return lambda query, key, value: masked_attention(query, key, value, bias, SIZE**-0.5, DROPOUT)


KERNELS = pytest.mark.parametrize("name", ["flash", "ours", "masked"])


@KERNELS
@SIXTEEN_BIT
@pytest.mark.usefixtures("_flash")
def test_dropout_drops_its_share(name: str, dtype: torch.dtype) -> None:
    """Catches weights that are not scaled up, a dropout of 1 - p, and masks that repeat in heads or rows."""
    attend_with = kernel_with_dropout(name, dtype)
    shape = (len(LENGTHS), HEADS, WIDTH, SIZE)
    zeros, ones = (torch.full(shape, value, device="cuda", dtype=dtype) for value in (0.0, 1.0))
    torch.manual_seed(1)
    # All weights are 1 / 64 in the second row: an output is the number of those that are kept / 64 / (1 - p).
    kept = torch.stack([attend_with(zeros, zeros, ones)[1, :, :, 0].float() for _ in range(200)])
    expected_std = (DROPOUT / (1 - DROPOUT) / WIDTH) ** 0.5
    # FlashAttention compares bytes, so it keeps 230/256 and not 9/10 of the weights.
    assert kept.mean().item() == pytest.approx(1.0, abs=4e-3)
    assert kept.std().item() == pytest.approx(expected_std, rel=0.05)
    by_position = kept.flatten(1)
    correlations = torch.corrcoef(by_position.T[:64]).abs() - torch.eye(64, device="cuda")
    assert correlations.max().item() < 0.5, "masks of two queries are alike"


@KERNELS
@SIXTEEN_BIT
@pytest.mark.usefixtures("_flash")
def test_dropout_depends_on_the_seed_and_the_backward_pass_repeats_it(name: str, dtype: torch.dtype) -> None:
    """Catches a resumed run that draws other masks, and gradients of other masks than those of the forward pass."""
    attend_with = kernel_with_dropout(name, dtype)
    draw = torch.Generator("cuda").manual_seed(2)
    shape = (len(LENGTHS), HEADS, WIDTH, SIZE)
    query, key, value, weights = (
        torch.randn(shape, generator=draw, device="cuda", dtype=dtype).requires_grad_() for _ in range(4)
    )
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(attend_with(query, key, value))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    weighted = (outputs[0].float() * weights.detach().transpose(1, 2).float()).sum()
    weighted.backward()
    # The output is a linear function of the values, so its derivative times the values is the output.
    assert (value.grad.float() * value.float()).sum().item() == pytest.approx(weighted.item(), rel=0.05, abs=1.0)
