"""Linear layers on a CPU whose weights are kept in the layout that oneDNN computes with.

Otherwise oneDNN brings them into that layout in each call, and autocast into bf16, which takes a third of the time for
few tokens. The original weights stay for code that reads them: in fp32, linear layers take twice the memory.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.fast_linear import ONEDNN_DTYPES, FastLinear
from finetune.device import Device

_ROWS = 512  # oneDNN chooses a layout that is good for about as many; any number can be computed
_MULTIPLE = 32  # of rows


def pack_linear_layers(model: nn.Module, device: Device) -> None:
    """Let the linear layers of a model compute with packed weights, for inference only. They give the same results up
    to rounding, in the precision of the device. Does nothing on a GPU, nor where oneDNN lacks the precision."""
    dtype = device.dtype or torch.float32
    if device.device.type != "cpu" or dtype not in ONEDNN_DTYPES:
        return
    for module in model.modules():
        if type(module) in (nn.Linear, FastLinear):
            module.__class__ = _PackedLinear
            cast(_PackedLinear, module).pack(dtype)


def padded_rows(count: int) -> int:
    """How many rows to compute for `count` of them: a power of two, or a multiple of 32.

    oneDNN generates code for each number of rows, and keeps that of about a thousand shapes: with any number, a server
    grows by some hundred MiB, and is slower by a fifth.
    """
    return 1 << (count - 1).bit_length() if count < _MULTIPLE else count + -count % _MULTIPLE


class _PackedLinear(nn.Linear):
    packed_: Tensor
    bias_: Tensor | None
    dtype_: torch.dtype

    def pack(self, dtype: torch.dtype) -> None:
        self.packed_ = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype), _ROWS)
        self.bias_ = None if self.bias is None else self.bias.detach().to(dtype)
        self.dtype_ = dtype

    def forward(self, values: Tensor) -> Tensor:
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else values.dtype
        if autocast != self.dtype_ or values.numel() == 0:  # a model may switch autocast off for some layers
            return F.linear(values, self.weight, self.bias)
        rows = values.reshape(-1, self.in_features).to(self.dtype_)
        count = len(rows)
        rows = F.pad(rows, (0, 0, 0, padded_rows(count) - count))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed_, self.bias_, "none", [], "")
        return product[:count].view(*values.shape[:-1], self.out_features)
