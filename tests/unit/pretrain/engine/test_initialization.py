from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from pretrain.engine.initialization import Fp16LossScaler, initialize, install_loss_scaler


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed logs overflows on rank 0, for which it asks the process group."""
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1)


class Optimizer:
    """As far as `install_loss_scaler` looks at one of DeepSpeed's."""

    def __init__(self, loss_scaler: Any) -> None:
        self.loss_scaler = loss_scaler


def scaler_of(scale: float = 16.0, window: int = 2, min_scale: float = 4.0, hysteresis: int = 1) -> Fp16LossScaler:
    return install_loss_scaler(Optimizer(DynamicLossScaler(scale, window, min_scale, hysteresis, False)))


def scales(scaler: Fp16LossScaler, overflows: list[bool]) -> list[tuple[float, float]]:
    """The scale that each step is unscaled with, and the one after it."""
    found = []
    for overflow in overflows:
        scaler.update_scale(overflow)
        during = scaler.cur_scale
        scaler.finish_step()
        found.append((during, scaler.cur_scale))
    return found


def deepspeed_scales(scaler: DynamicLossScaler, overflows: list[bool]) -> list[float]:
    found = []
    for overflow in overflows:
        scaler.update_scale(overflow)
        found.append(scaler.cur_scale)
    return found


@pytest.mark.parametrize("hysteresis", [1, 2])
def test_new_scale_applies_from_the_next_step(hysteresis: int) -> None:
    """Catches a gradient that is unscaled with a scale that has just doubled or halved, a scale that changes twice in
    one step, and a sequence of scales that is not DeepSpeed's."""
    overflows = [False, False, False, True, True, False, False, False, True]
    found = scales(scaler_of(hysteresis=hysteresis), overflows)
    expected = deepspeed_scales(DynamicLossScaler(16.0, 2, 4.0, hysteresis, False), overflows)
    assert [after for _, after in found] == expected
    assert [during for during, _ in found] == [16.0, *expected[:-1]]
    assert max(expected) > 16.0 > min(expected[3:]) or hysteresis == 2


def test_overflow_at_the_smallest_scale_is_reported_not_raised() -> None:
    """Catches DeepSpeed's bare Exception, a run reported as stuck while the scale can still fall or hysteresis is
    left, and one that stays stuck after a good step."""
    falling = [(8.0, False), (4.0, False), (4.0, True), (4.0, False), (4.0, True)]
    at_smallest = [(4.0, False), (4.0, True), (4.0, True), (4.0, False), (4.0, True)]
    for scale, expected in ((8.0, falling), (4.0, at_smallest)):
        scaler = scaler_of(scale, min_scale=4.0, hysteresis=2)
        found = []
        for overflow in (True, True, True, False, True):
            scaler.update_scale(overflow)
            scaler.finish_step()
            found.append((scaler.cur_scale, scaler.stuck))
        assert found == expected


def test_loaded_state_repeats_the_uninterrupted_scales() -> None:
    """Catches a window or hysteresis that a resume forgets, and an empty state that resets a scaler."""
    overflows = [True, False, False, True, False, False, False, True, True]
    uninterrupted = scales(scaler_of(hysteresis=2), overflows)
    for stop in range(len(overflows)):
        first, resumed = scaler_of(hysteresis=2), scaler_of(hysteresis=2)
        before = scales(first, overflows[:stop])
        resumed.load_state(first.state())
        resumed.load_state({})
        assert before + scales(resumed, overflows[stop:]) == uninterrupted


def test_only_dynamic_scalers_are_replaced() -> None:
    """Catches a constant scale, of bf16 or fp32, that is saved and checked as if it were dynamic."""
    assert install_loss_scaler(Optimizer(LossScaler(1.0))) is None
    assert install_loss_scaler(object()) is None


@pytest.mark.parametrize("printed", ["", "memory: 1 GiB"])
def test_what_deepspeed_prints_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], printed: str
) -> None:
    """Catches its output on the terminal, and an empty first message in the log of rank 0."""
    monkeypatch.setattr("deepspeed.initialize", lambda **_: (print(printed), None))
    caplog.set_level("INFO", "deepspeed")
    model = torch.nn.Linear(1, 1)
    initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    assert caplog.messages == list(filter(None, [printed]))
    assert capsys.readouterr().out == ""
