from collections import Counter
from pathlib import Path

import pytest
import torch

from finetune.device import Device
from finetune.resolve import load_run_config, resolve


def test_the_loss_has_the_options_of_the_config(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches balanced classes or smoothed labels that no loss gets, and a task on another device than the chosen."""
    device = Device(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr("finetune.resolve.choose_device", lambda _: device)
    flags = {"training.class_weights": "balanced", "training.label_smoothing": "0.1"}
    task = resolve(load_run_config(config_file, flags)).task
    assert task.device == device
    assert task.loss_options.label_smoothing == 0.1
    counts = Counter(example.target for example in task.splits["train"].examples)
    expected = [80 / (2 * counts[label]) for label in (0, 1)]
    assert task.loss_options.label_weights is not None
    assert task.loss_options.label_weights.tolist() == pytest.approx(expected)
