"""The section `schedule` of the config of a pretraining run, and its stages."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from experiment.config import Section
from experiment.config.field_types import Count, Fraction, SequenceLength


class StageConfig(Section):
    """A part of a run. Missing values are taken from `batch`."""

    steps: Count | None = None
    """Length of the stage. Only the last stage may omit it; it then takes the rest of the run."""

    max_seq_length: SequenceLength | None = None
    """Overrides `batch.max_seq_length`."""

    sequences: Count | None = None
    """Overrides `batch.sequences`."""

    microbatch_tokens: PositiveInt | None = None
    """Overrides `batch.microbatch_tokens`."""


class Stage(NamedTuple):
    """A stage with every value filled in."""

    first_step: int
    max_seq_length: int
    sequences: int
    microbatch_tokens: int


class ScheduleConfig(Section):
    """The learning-rate schedule and the length of the run. Set exactly one of `steps`, `epochs`, `tokens` and
    `budget`; none is needed if every stage has `steps`. See docs/schedules.md."""

    name: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "wsd"] = "linear"
    """Shape of the decay after the warmup. `wsd` is warmup-stable-decay."""

    warmup_steps: NonNegativeInt = 100
    """Steps of linear warmup to `optimizer.lr`."""

    steps: Count | None = None
    """Train for this many steps (global batches)."""

    epochs: Annotated[PositiveFloat, Field(le=1e9)] | None = None
    """Train for this many epochs, such as 0.5 or 3. For a single corpus, without stages."""

    tokens: Annotated[PositiveFloat, Field(le=1e18)] | None = None
    """Train for about this many tokens, special tokens included and padding excluded."""

    budget: str | None = None
    """Train for this much time, such as 30m, 24h or 1d12h, summed over restarts."""

    min_lr_ratio: Fraction = 0.0
    """Minimum learning rate, as a fraction of `optimizer.lr`."""

    decay_steps: PositiveInt | None = None
    """Length of the final decay of `wsd`; null: a tenth of the run."""

    power: PositiveFloat = 2.0
    """Exponent of `polynomial`; 1 is linear."""

    batch_warmup_steps: NonNegativeInt = 0
    """Steps over which the global batch grows to `batch.sequences`."""

    stages: tuple[StageConfig, ...] = ()
    """Consecutive parts of the run, each with its own sequence length and batch size."""

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget is None else _seconds(self.budget)

    def seconds_left(self, seconds: float) -> float | None:
        """Return the rest of the time budget after this many seconds of training; None without one."""
        return None if self.budget_seconds is None else self.budget_seconds - seconds

    @property
    def known_steps(self) -> int | None:
        """The length of the run, if the config gives it in steps."""
        if self.stages and self.stages[-1].steps is not None:
            return sum(stage.steps or 0 for stage in self.stages)
        return self.steps

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield settings that have no effect in a run of this many steps."""
        for key in ("warmup_steps", "batch_warmup_steps"):
            if getattr(self, key) >= steps:
                yield f"schedule.{key} is {getattr(self, key):,}, but the run has only {steps:,} steps"
        if self.decay_steps is not None and self.decay_steps > steps:
            yield f"schedule.decay_steps is {self.decay_steps:,}, but the run has only {steps:,} steps"

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, budget: object) -> object:
        if budget is not None:
            _seconds(str(budget))
        return budget

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = [key for key in ("steps", "epochs", "tokens", "budget") if getattr(self, key) is not None]
        if len(lengths) > 1 or not (lengths or self.stages):
            raise ValueError(
                "needs exactly one of 'steps', 'epochs', 'tokens' and 'budget'"
                + (f", found {' and '.join(map(repr, lengths))}" if lengths else "")
            )
        if self.decay_steps is not None and (self.name != "wsd" or self.budget is not None):
            raise ValueError("'decay_steps' belongs to the schedule 'wsd' with a length in steps, epochs or tokens")
        if self.name == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("'inverse_sqrt' is lr * sqrt(warmup_steps / step), so 'warmup_steps' must not be 0")
        if self.stages:
            self._check_stages()
        if self.decay_steps is not None and self.known_steps is not None and self.decay_steps > self.known_steps:
            raise ValueError(f"'decay_steps' is {self.decay_steps}, longer than the run of {self.known_steps} steps")
        return self

    def _check_stages(self) -> None:
        if self.epochs is not None:
            raise ValueError("'stages' cannot be combined with 'epochs': a stage of another length starts new epochs")
        *others, last = self.stages
        if any(stage.steps is None for stage in others):
            raise ValueError("'stages': only the last one may omit 'steps'")
        total = sum(stage.steps or 0 for stage in self.stages)
        if last.steps is None:
            if self.steps is None and self.tokens is None and self.budget is None:
                raise ValueError("'stages': the last one omits 'steps', so set 'steps', 'tokens' or 'budget'")
            if self.steps is not None and total >= self.steps:
                raise ValueError(
                    f"'stages' take {total} steps, which leaves none of the run's {self.steps} for the last one"
                )
        elif self.steps not in (None, total) or self.tokens is not None or self.budget is not None:
            raise ValueError(
                f"'stages' take {total} steps, which is not the length of the run; omit 'steps' of the last one"
            )


def _seconds(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m, 24h or 1d12h. Raises ValueError."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([dhms])", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if not 0 < seconds < math.inf or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"'{text}' is not a duration such as 90s, 30m, 24h or 1d12h")
    return seconds
