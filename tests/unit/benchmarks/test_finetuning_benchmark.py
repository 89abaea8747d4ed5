from types import SimpleNamespace

import pytest
import torch

from benchmarks import finetuning
from benchmarks.finetuning import DEEPCLOZE, GROUPED, PADDED


@pytest.mark.parametrize("name", [DEEPCLOZE, GROUPED, PADDED])
def test_all_have_the_same_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ratio that is that of settings of the allocator."""
    calls: list[str] = []

    def measured(*_: object) -> tuple[float, float]:
        calls.append("trains")
        return 2.0, 0.5

    run = SimpleNamespace(training=SimpleNamespace(batch_size=4))
    monkeypatch.setattr(finetuning, "load_run_config", lambda *_: None)
    monkeypatch.setattr(finetuning, "resolve", lambda _: run)
    monkeypatch.setattr(finetuning, "keep_freed_memory", lambda: calls.append("keeps memory"))
    monkeypatch.setattr(finetuning, "_measure_deepcloze", measured)
    monkeypatch.setattr(finetuning, "_measure_trainer", measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert finetuning.measure(name, "task.yaml", "fp32", 3, 1) == {"rate": 6.0, "accuracy": 0.5}
    assert calls == ["keeps memory", "trains"]
