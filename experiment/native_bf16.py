"""Whether a device computes bf16 itself."""

import torch


def has_native_bf16(device_type: str) -> bool:
    """False where bf16 is emulated, several times slower than fp32. device_type: cpu or cuda."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(feature, False) for feature in ("avx512_bf16", "amx_bf16"))
