"""Fast dropout on a CPU, and in compiled code on a GPU.

torch draws one 32-bit number per element. On a CPU that takes longer than the layer before the dropout, and in compiled
code on a GPU as long as all else that is fused with it. All random numbers here come from torch's generator and depend
on its seed.

On a CPU, every element uses one byte of a random 64-bit word, which is about five times faster. The probability is
rounded to a multiple of 1/256 (0.1 to 26/256), and kept elements are scaled by the rounded probability, so the
expectation is exact.

In compiled code on a GPU, an element is dropped if the product of a random odd number of its row and one of its column,
modulo 2^32, is small: no masks are written to memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BYTE = 256


def fast_dropout(values: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the others up; any shape. Always drops: call it in training only.

    Outside of compiled code on CUDA, and for a probability that rounds to 0 or 1, torch's own dropout."""
    threshold = round(probability * _BYTE)
    if threshold in (0, _BYTE) or (values.is_cuda and not torch.compiler.is_compiling()):
        return F.dropout(values, probability)
    if values.is_cuda:
        return ProductDropout.apply(values, probability)  # type: ignore[no-untyped-call, no-any-return]
    return _ByteDropout.apply(values, threshold)  # type: ignore[no-untyped-call, no-any-return]


def use_fast_dropout(model: nn.Module) -> None:
    """Switch the model's dropout layers to `fast_dropout`. Parameters and their names do not change.

    From then on, torch does not use cuDNN for attention in this process: with dropout, four queries get the same mask
    there (cuDNN 9.19 on an H200)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = _FastDropout


class _FastDropout(nn.Dropout):
    def forward(self, values: Tensor) -> Tensor:
        return fast_dropout(values, self.p) if self.training else values


def _random_bytes(values: Tensor) -> Tensor:
    """Draw uint8 in the shape of `values`."""
    words = torch.empty(-(-values.numel() // 8), dtype=torch.int64, device=values.device).random_(-(2**63), None)
    return words.view(torch.uint8)[: values.numel()].view(values.shape)


# torch.compile does not look inside an operator of ours. On a CPU, masks are the same in compiled code.
@torch.library.custom_op("deepcloze::random_bytes", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _compiled_random_bytes(values: Tensor) -> Tensor:
    return _random_bytes(values)


@_compiled_random_bytes.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=torch.uint8, device=values.device)


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: int) -> Tensor:
        if torch.compiler.is_compiling():
            kept = _compiled_random_bytes(values) >= threshold
        else:  # in place, the result is a number again: torch has fast code for that, but not for booleans
            kept = _random_bytes(values).ge_(threshold)
        mask = kept.to(values.dtype)
        ctx.save_for_backward(mask)
        ctx.scale = _BYTE / (_BYTE - threshold)
        return _scaled_product(values, mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _scaled_product(gradient, mask, ctx.scale), None


def _scaled_product(values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """values * mask * scale, rounded once."""
    return torch.addcmul(values.new_zeros(()), values, mask, value=scale)


@torch.library.custom_op("deepcloze::random_numbers", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _random_numbers(values: Tensor) -> Tensor:
    """Draw int32: for each column of [..., columns], where they can be loaded four at a time, and for each row."""
    count = _count_numbers(values)
    words = torch.empty((count + 1) // 2, dtype=torch.int64, device=values.device).random_(-(2**63), None)
    return words.view(torch.int32)[:count]


@_random_numbers.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty(_count_numbers(values), dtype=torch.int32, device=values.device)


def _count_numbers(values: Tensor) -> int:
    columns = values.shape[-1]
    return values.numel() // columns + columns


class ProductDropout(torch.autograd.Function):
    """Both directions compute which elements are kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, probability: float) -> Tensor:
        numbers = odd_numbers(values)
        ctx.save_for_backward(numbers)
        ctx.probability = probability
        return drop(values, numbers, probability)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return drop(gradient, numbers, ctx.probability), None


def odd_numbers(values: Tensor) -> Tensor:
    """Draw odd int32: for each column of [..., columns], then for each row."""
    numbers: Tensor = _random_numbers(values)
    return numbers | 1


def smallest_kept(probability: float) -> int:
    """Return the threshold in int32: an element is kept if the product of its two numbers is at least this."""
    return round(probability * 2**32) - 2**31


def drop(values: Tensor, numbers: Tensor, probability: float) -> Tensor:
    """Zero elements and scale the others up. numbers: from `odd_numbers`, the same in the backward pass."""
    columns = values.shape[-1]
    products = numbers[columns:].view(*values.shape[:-1], 1) * numbers[:columns]  # modulo 2^32
    kept = products >= smallest_kept(probability)
    return torch.where(kept, values * (1 / (1 - probability)), 0.0)
