"""Start DeepSpeed: without its output on the terminal, and with a loss scaler that can be restored.

Dynamic loss scaling for fp16 (Micikevicius et al. 2018, "Mixed precision training") is DeepSpeed's, with two changes.
DeepSpeed updates the scale before it unscales the gradients, so that a step after which the scale doubles is taken with
half its gradient: here a new scale applies from the next step. And where DeepSpeed raises a bare Exception on an
overflow at the smallest scale, `Fp16LossScaler.stuck` is set. The trainer restores the state after a bad batch, which
the scaler takes for an overflow.
"""

import contextlib
import importlib
import io
import logging
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn

from pretrain.engine.kernel_lock import install_kernel_lock

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """Call `deepspeed.initialize`, without its output on the terminal."""
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # it warns of optimizers that it has not tested
    _import_muon()
    install_kernel_lock()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # one of its optimizers prints the machine's memory six times
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if text := printed.getvalue().strip():
        logging.getLogger("deepspeed").info("%s", text)
    logging.getLogger("DeepSpeed").addFilter(_is_not_overflow_message)
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which it compares optimizers with, without compiling its kernels: `torch.compile` would
    import torch's inductor, which takes a second."""
    compile_kernel = compiler.compile
    compiler.compile = lambda *_, **__: lambda kernel: kernel
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_kernel


def _is_not_overflow_message(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's messages about overflows: the trainer reports gradients that are not finite in more detail."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


class Fp16LossScaler(DynamicLossScaler):  # type: ignore[misc]
    """The dynamic loss scaler of an optimizer that DeepSpeed built."""

    cur_scale: float
    stuck = False  # the last step overflowed at the smallest scale
    _next_scale: float

    def update_scale(self, overflow: bool) -> None:
        scale, last_chance = self.cur_scale, 1 in (self.delayed_shift, self.cur_hysteresis)
        self.stuck = overflow and last_chance and scale <= self.min_scale
        super().update_scale(overflow)
        self.cur_scale, self._next_scale = scale, self.cur_scale

    def finish_step(self) -> None:
        """Apply the new scale, after the gradients of the step are unscaled."""
        self.cur_scale = self._next_scale

    def state(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in _SCALER_STATE}

    def load_state(self, state: dict[str, float]) -> None:
        """Load a state. An empty one, from a run in another precision, changes nothing."""
        for key, value in state.items():
            setattr(self, key, value)


def install_loss_scaler(optimizer: Any) -> Fp16LossScaler | None:
    """Replace the dynamic loss scaler of DeepSpeed's optimizer; None where it has none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        return None
    scaler.__class__ = Fp16LossScaler
    scaler.raise_error_at_min_scale = False
    assert isinstance(scaler, Fp16LossScaler)
    return scaler
