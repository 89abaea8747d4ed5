"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, "Mixed precision training").

DeepSpeed's scaler, with two changes. DeepSpeed updates the scale before it unscales the gradients, so that a step
after which the scale doubles is taken with half its gradient: here a new scale applies from the next step. And where
DeepSpeed raises a bare Exception on an overflow at the smallest scale, `Fp16LossScaler.stuck` is set.

The trainer restores the state after a bad batch, which the scaler takes for an overflow.
"""

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from experiment.errors import AgreedFailureError

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaleError(AgreedFailureError):
    """fp16 gradients overflow at the smallest loss scale."""


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
        return {key: getattr(self, key) for key in _STATE}

    def load_state(self, state: dict[str, float]) -> None:
        """An empty state, from a run in another precision, changes nothing."""
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
