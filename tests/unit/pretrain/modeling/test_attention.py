from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, ModernBertConfig

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

HEADS, SIZE, WIDTH = 2, 8, 12
SEGMENTS = torch.tensor([[1] * 7 + [2] * 4 + [0], [3] * 12])
CU_SEQLENS = torch.tensor([0, 7, 11, 12, 24], dtype=torch.int32)
WINDOWS = pytest.mark.parametrize("sliding_window", [None, 1, 3, 40])


@pytest.mark.parametrize(
    ("capability", "head_size", "dtype", "supported"),
    [
        (None, 64, torch.bfloat16, False),  # a CPU
        ((8, 0), 64, torch.bfloat16, True),
        ((9, 0), 64, torch.float16, True),
        ((9, 0), 64, torch.float32, False),
        ((7, 0), 64, torch.float16, False),  # V100
        ((7, 5), 64, torch.float16, False),
        ((13, 0), 64, torch.float16, False),  # newer than torch's kernels
        ((9, 0), 26, torch.float16, False),  # 312 / 12, TinyBERT
        ((9, 0), 256, torch.float16, True),
        ((9, 0), 264, torch.float16, False),
        ((8, 0), 256, torch.float16, True),
        ((8, 6), 200, torch.float16, False),  # little shared memory
        ((8, 9), 192, torch.float16, True),
        ((12, 0), 256, torch.float16, False),
    ],
)
def test_where_flash_attention_is_used(
    capability: tuple[int, int] | None, head_size: int, dtype: torch.dtype, supported: bool
) -> None:
    """Catches flash attention on a device, or for a model, where torch refuses it, and masks where it would do."""
    assert supports_flash(capability, head_size, dtype) == supported


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 129}, False),
        ({"max_length": 128}, False),  # flash attention computes 128 slots at once
        ({"key_heads": 2}, True),
        ({"dtype": torch.float32}, False),
        ({"capability": (9, 0), "sliding_window": None}, True),
        ({"capability": (9, 0), "max_length": 128}, True),
    ],
    ids=str,
)
def test_where_our_own_kernel_is_used(changes: dict[str, Any], ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches inputs that it computes wrongly, and ones for which others are faster."""
    options: dict[str, Any] = {
        "capability": (8, 0),
        "sliding_window": 65,
        "max_length": 1024,
        "key_heads": 4,
    } | changes
    dtype, called = options.get("dtype", torch.bfloat16), list[str]()

    def kernel(name: str) -> Any:
        def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
            assert query.shape == key.shape == value.shape
            called.append(name)
            return query

        return attend

    for name in ("flash_attention_2", "masked_attention"):
        monkeypatch.setattr(attention, name, kernel(name))
    bounds = torch.tensor([0, 1024])
    packing = Packing(
        torch.ones(1, 1024), bounds, options["max_length"], varlen=VarlenKernels(kernel("ours"), kernel("qkv"))
    )
    packing.capability = options["capability"]
    query, key = (torch.zeros(1, heads, 1024, 64, dtype=dtype) for heads in (4, options["key_heads"]))
    packed_attention(nn.Module(), query, key, key, None, packing=packing, sliding_window=options["sliding_window"])
    (name,) = called
    assert (name == "ours") == ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_kernel_of_our_own_that_does_not_work_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends because Triton does not work, and a warning of kernels that would not be used. The trial
    fails here: there is no CUDA device."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "device_capability", lambda _: (9, 0))
    attention._tried_varlen_kernels.cache_clear()
    assert choose_varlen_kernels(ModernBertConfig(), cuda, dtype, True) is None
    assert "attention is that of torch" in caplog.text
    assert choose_varlen_kernels(ModernBertConfig(hidden_size=96, num_attention_heads=3), cuda, dtype, True) is None
    monkeypatch.setattr(attention, "device_capability", lambda _: (8, 0))
    assert choose_varlen_kernels(BertConfig(), cuda, dtype, False) is None
    assert len(caplog.records) == 1
    attention._tried_varlen_kernels.cache_clear()


def draw_inputs(device: str = "cpu") -> list[Tensor]:
    """Query, key and value [B, H, W, D], laid out as the models do: slots before heads."""
    draw = torch.Generator().manual_seed(3)
    shape = (2, WIDTH, HEADS, SIZE)
    return [torch.randn(shape, generator=draw).to(device).transpose(1, 2).requires_grad_() for _ in range(3)]


def expected_attention(inputs: list[Tensor], sliding_window: int | None) -> Tensor:
    bias = Packing(SEGMENTS, CU_SEQLENS).bias(sliding_window, torch.float32)
    return attention.matmul_attention(*inputs, bias, SIZE**-0.5, 0.0)


def reference_flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, _: Any, longest: int, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """What `aten::_flash_attention_forward` is documented to compute, sequence by sequence."""
    _, dropout, causal, debug = rest
    assert (dropout, causal, debug) == (0.0, False, False)
    left, right = options.get("window_size_left"), options.get("window_size_right")  # None is not passed on
    output = torch.empty_like(query)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - start <= longest
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * options["scale"]
        distance = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        blocked = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            blocked = (distance < -left) | (distance > right)
        weights = scores.masked_fill(blocked, -torch.inf).softmax(-1)
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, value[start:end])
    empty = query.new_empty(0)
    return output, empty, empty, empty, empty


@pytest.fixture
def _flash_on_cpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", reference_flash, "CPU")
    yield
    library._destroy()


@WINDOWS
@pytest.mark.usefixtures("_flash_on_cpu")
def test_flash_attention_gets_what_the_operator_expects(sliding_window: int | None) -> None:
    """Catches transposed heads, a local window that is off by one, and a wrong scale."""
    inputs = [tensor.detach() for tensor in draw_inputs()]
    found = flash_attention(*inputs, Packing(SEGMENTS, CU_SEQLENS), SIZE**-0.5, 0.0, sliding_window)
    torch.testing.assert_close(found, expected_attention(inputs, sliding_window))


@WINDOWS
@pytest.mark.usefixtures("_flash_on_cpu")
def test_one_row_of_all_slots_with_padded_boundaries(sliding_window: int | None) -> None:
    """Catches a flat layout that is not what rows compute, and empty sequences at the end of the boundaries."""
    inputs = [tensor.detach() for tensor in draw_inputs()]
    flat = [tensor.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for tensor in inputs]
    bounds = torch.cat([CU_SEQLENS, CU_SEQLENS[-1:].repeat(3)])
    packing = Packing(SEGMENTS.reshape(1, -1), bounds, max_length=12)
    found = flash_attention(*flat, packing, SIZE**-0.5, 0.0, sliding_window)
    torch.testing.assert_close(found, expected_attention(inputs, sliding_window).reshape(1, 2 * WIDTH, HEADS, SIZE))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@WINDOWS
def test_flash_attention_has_gradients(dropout: float, sliding_window: int | None) -> None:
    """Catches arguments that the operator or its derivative does not take, in the installed torch."""
    inputs = [tensor.to(torch.bfloat16).detach().requires_grad_() for tensor in draw_inputs("meta")]
    packing = Packing(SEGMENTS.to("meta"), CU_SEQLENS.to("meta"))
    output = flash_attention(*inputs, packing, SIZE**-0.5, dropout, sliding_window)
    assert output.shape == (2, WIDTH, HEADS, SIZE)
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in inputs)


@WINDOWS
def test_attention_with_a_mask_equals_matmul(sliding_window: int | None) -> None:
    """Catches a mask with the wrong sign or a scale that is applied twice; gradients too."""
    expected, found = draw_inputs(), draw_inputs()
    bias = Packing(SEGMENTS, CU_SEQLENS).bias(sliding_window, torch.float32)
    outputs = [expected_attention(expected, sliding_window), masked_attention(*found, bias, SIZE**-0.5, 0.0)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * torch.arange(SIZE)).sum().backward()
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_masks_are_built_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mask [B, 1, W, W] that each layer builds anew."""
    packing, built = Packing(SEGMENTS, CU_SEQLENS), []
    build = Packing._blocked

    def record(self: Packing, window: int | None) -> Tensor:
        built.append(window)
        return build(self, window)

    monkeypatch.setattr(Packing, "_blocked", record)
    for window in (None, 3, None, 3):
        packed_attention(nn.Module(), *draw_inputs(), None, packing=packing, sliding_window=window)
    assert built == [None, 3]
