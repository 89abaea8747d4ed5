from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, PreTrainedConfig

from pretrain.batching.packing import Rows
from pretrain.modeling.row_layout import choose_rows

HEADS_OF_32 = BertConfig(hidden_size=128, num_attention_heads=4)
HEADS_OF_26 = BertConfig(hidden_size=312, num_attention_heads=12)


@pytest.mark.parametrize(
    ("packed", "config", "dtype", "capability", "rows"),
    [
        (True, HEADS_OF_32, torch.bfloat16, (9, 0), "flat"),
        (True, DistilBertConfig(dim=128, n_heads=4), torch.float16, (8, 0), "flat"),
        (False, HEADS_OF_32, torch.bfloat16, (9, 0), "padded"),
        (False, HEADS_OF_32, torch.bfloat16, None, "padded"),
        (True, HEADS_OF_32, torch.float32, (9, 0), "windows"),
        (True, HEADS_OF_26, torch.bfloat16, (9, 0), "windows"),
        (True, HEADS_OF_32, torch.float16, (7, 0), "windows"),
        (True, HEADS_OF_32, torch.bfloat16, None, "windows"),
        (True, PreTrainedConfig(), torch.bfloat16, (9, 0), "windows"),
    ],
)
def test_rows_are_flat_only_for_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    rows: Rows,
) -> None:
    """Catches flat rows for a kernel that compares all slots of a row, whose memory would not suffice, and windows
    where flash attention would do. `capability` None: no CUDA device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    built: Any = SimpleNamespace(packed=packed, model=SimpleNamespace(config=config))
    assert choose_rows(built, dtype) == rows
