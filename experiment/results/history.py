"""Logged metrics of a run: curves by seed and key, of bounded size. Only new lines of its files are read."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from experiment.results.curves import Curve
from experiment.run_files.metrics_file import Event, EventReader
from experiment.run_files.run_folder import RunFolder

_KEYS = frozenset({"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "data_wait", "memory"})
_EVALUATION = "eval/"
_LARGEST = 1e300  # larger numbers are left out, as are NaN and infinity

Axis = Mapping[str, Sequence[float]]
"""`step`, and `tokens` and `seconds` of training at these steps; empty where not known."""
NO_AXIS: Axis = {"step": [], "tokens": [], "seconds": []}


@dataclass
class SeedHistory:
    """The history of a fine-tuning seed, with steps from its start, or of a pretraining run."""

    step: int = 0  # the last one
    curves: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))  # by key; no other ones are kept
    last: dict[str, float] = field(default_factory=dict)  # by key; NaN if the last event with it has no number
    # Tokens and seconds at the events that have a speed. Replaced together: another thread may read.
    _time: tuple[Curve, Curve] = field(default_factory=lambda: (Curve(), Curve()))
    _start: tuple[float, float] = (0.0, 0.0)  # step and tokens: of a fork, those of its parent

    def extend(self, events: Sequence[Event], first_step: int) -> None:
        """Add events. first_step: where the seed starts in the file."""
        last: Event = {}
        for event in events:
            last |= event
        columns = {
            key: _numbers([event.get(key) for event in events])
            for key in last
            if key == "step" or key in _KEYS or key.startswith(_EVALUATION)
        }
        steps = columns.pop("step") - first_step
        self.step = max(self.step, int(np.fmax.reduce(steps, initial=0)))
        for key, values in columns.items():
            known = ~np.isnan(values + steps)
            self.curves[key].extend(steps[known], values[known])
            self.last[key] = float(_numbers([last[key]])[0])
        if "tokens" in columns and "tokens_per_second" in columns:
            self._extend_time(steps, columns["tokens"], columns["tokens_per_second"])

    def _extend_time(
        self, steps: NDArray[np.float64], tokens: NDArray[np.float64], speeds: NDArray[np.float64]
    ) -> None:
        known = ~np.isnan(steps + tokens + speeds)
        tokens_curve, seconds_curve = map(copy.copy, self._time)
        before, start = (curve.last[1] if len(curve) else 0.0 for curve in self._time)
        steps, tokens, speeds = steps[known], tokens[known], speeds[known]
        if not len(tokens_curve) and len(steps):
            first_step, first = self.curves["tokens"].lowest
            if first_step < steps[0]:  # a fork logs first, without a speed, where it starts
                self._start, before = (first_step, first), first
        taken = np.maximum(np.diff(tokens, prepend=before), 0.0)
        spent = np.cumsum(np.divide(taken, speeds, out=np.zeros_like(taken), where=speeds > 0))
        tokens_curve.extend(steps, tokens)
        seconds_curve.extend(steps, start + spent)
        self._time = tokens_curve, seconds_curve

    def curve(self, key: str) -> Curve:
        """Return the curve of a key; empty if there are no numbers with it."""
        return self.curves.get(key, Curve())

    @property
    def axis(self) -> Axis:
        """The x axis. Time is taken from the log events, without evaluations, checkpoints and work lost in a crash."""
        (steps, tokens), (_, seconds) = (curve.ends for curve in self._time)
        if not len(steps):
            return NO_AXIS
        found = zip(NO_AXIS, (*self._start, 0.0), (steps, tokens, seconds), strict=True)
        return {name: [start, *values.tolist()] for name, start, values in found}


class History:
    """The history of a run, from RUN/metrics.jsonl and the files of seeds that are trained in parallel."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._logged = _File(folder.metrics)
        self._unfinished: dict[Path, _File] = {}  # RUN/logs/seed-N.jsonl

    @classmethod
    def of(cls, folder: RunFolder) -> Self:
        """Read the history of a run so far. Raises OSError."""
        history = cls(folder)
        history.read()
        return history

    def read(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """Read new lines. Raises OSError. on_progress: called often."""
        paths = sorted(self._folder.logs.glob("seed-*.jsonl"))
        unfinished = {path: self._unfinished.get(path) or _File(path) for path in paths}
        for file in unfinished.values():
            file.read(on_progress)
        self._logged.read(on_progress)  # last: a seed that ends is moved to it
        self._unfinished = unfinished

    @property
    def unread(self) -> float:
        """The share of metrics.jsonl that is not read yet."""
        return self._logged.events.unread

    @property
    def seeds(self) -> dict[int | None, SeedHistory]:
        """Histories by fine-tuning seed; None: a pretraining run."""
        found: dict[int | None, SeedHistory] = {}
        for file in (self._logged, *self._unfinished.values()):
            for seed, history in file.seeds.items():
                found.setdefault(seed, history)  # a seed is moved to metrics.jsonl when it is finished
        return found

    @property
    def step(self) -> int:
        return max((seed.step for seed in self.seeds.values()), default=0)

    @property
    def corpora(self) -> list[str]:
        """Names of the held-out corpora, in the order of their first evaluation."""
        keys = [key for seed in self.seeds.values() for key in list(seed.curves) if key.startswith(_EVALUATION)]
        return list(dict.fromkeys(key.removeprefix(_EVALUATION).rsplit("/", 1)[0] for key in keys))

    def last(self, key: str) -> float | None:
        """Return the last number with this key; None without any, or if the last evaluation has none."""
        if not key.startswith(_EVALUATION):
            return next((curve.last[1] for curve in reversed(list(self._curves(key)))), None)
        found = [seed.last[key] for seed in self.seeds.values() if key in seed.last]
        return found[-1] if found and not math.isnan(found[-1]) else None

    def highest(self, key: str) -> float | None:
        return max((curve.highest[1] for curve in self._curves(key)), default=None)

    def best_loss(self, corpus: str) -> tuple[float, int | None] | None:
        """Return the lowest loss on a held-out corpus, and its step; of several seeds the mean, without a step. None
        without any."""
        found = [curve.lowest for curve in self._curves(f"{_EVALUATION}{corpus}/loss")]
        step = int(found[0][0]) if len(found) == 1 else None
        return (fmean(loss for _, loss in found), step) if found else None

    def median(self, key: str) -> float | None:
        """Return the median over the log events; of a long run, over the means of equal parts of it."""
        means = [curve.means for curve in self._curves(key)]
        return float(np.median(np.concatenate(means))) if means else None

    def _curves(self, key: str) -> Iterator[Curve]:
        for seed in self.seeds.values():
            if len(curve := seed.curve(key)):
                yield curve


class _File:
    """The events of a file by seed. In the file, the steps continue from one seed to the next; all seeds log at the
    same steps of their own."""

    def __init__(self, path: Path) -> None:
        self.events = EventReader(path)
        self.seeds: dict[int | None, SeedHistory] = {}
        self._first_logged = 0  # step of the first event
        self._starts: dict[int | None, int] = {}

    def read(self, on_progress: Callable[[], object]) -> None:
        for events in self.events.read_new():
            if events is None:
                self.seeds, self._starts = {}, {}
            for seed, group in groupby(events or (), key=_seed):
                of_seed = list(group)
                if not self._starts:
                    self._first_logged = of_seed[0]["step"]
                start = self._starts.setdefault(seed, of_seed[0]["step"] - self._first_logged)
                if seed not in self.seeds:
                    self.seeds = {**self.seeds, seed: SeedHistory()}  # another thread may iterate over them
                self.seeds[seed].extend(of_seed, start)
            on_progress()


def _seed(event: Event) -> int | None:
    seed = event.get("seed")
    return seed if type(seed) is int else None


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """Convert to numbers; NaN for other values, and for numbers that are too large."""
    try:
        found = np.array(values, dtype=np.float64)
        if found.ndim != 1:
            raise ValueError
    except (ValueError, TypeError, OverflowError):  # text, a list, or a whole number that no double holds
        plain = [value if type(value) in (int, float) and abs(value) < _LARGEST else np.nan for value in values]
        found = np.array(plain, dtype=np.float64)
    found[np.abs(found) >= _LARGEST] = np.nan
    return found
