"""Which rows a model is fed on a device."""

import torch

from pretrain.batching.packing import Rows
from pretrain.modeling.attention import uses_flash
from pretrain.modeling.build import BuiltModel
from pretrain.modeling.flops import FlopsModel


def attention_ratio(flops: FlopsModel | None) -> float | None:
    """What the width of windows is chosen from. None on CUDA, where no width has been measured: theirs is that of the
    longest sequence."""
    return None if flops is None or torch.cuda.is_available() else flops.attention_ratio


def choose_rows(model: BuiltModel, dtype: torch.dtype) -> Rows:
    """Flat rows where flash attention computes them, in `dtype` on this process's CUDA device. Other kernels compare
    all slots of a row, so they get windows."""
    if not model.packed:
        return "padded"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return "flat" if uses_flash(model.model.config, capability, dtype) else "windows"
