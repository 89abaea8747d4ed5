from types import SimpleNamespace
from typing import Any

from pretrain.training.trainer import Trainer


def test_mfu_is_unknown_for_a_model_with_unknown_flops() -> None:
    """Catches a run on a GPU that stops at its first log line because of a figure that cannot be computed."""
    trainer: Any = SimpleNamespace(_on_gpu=True, _flops=None)
    assert Trainer._mfu(trainer, seconds=1.0) is None
