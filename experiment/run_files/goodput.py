"""Wall-clock time of a run by activity, over all its attempts. The useful share is its goodput.

1. Rank 0 times its activities, `ActivityTimer`, and adds a line to RUN/logs/goodput.jsonl at each log event and around
   each evaluation and checkpoint: the seconds of its attempt so far, by activity.
2. The last complete line of an attempt stands for it. A kill loses the time since that line.
3. The launcher adds a line when all processes of an attempt have ended, if the last one says that it was ending.
4. `add_up` sums the attempts. The time between the last line of one and the start of the next was `DOWN`.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

from experiment.files import parse_records, write_text
from experiment.process.own_process import START_VARIABLE
from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from experiment.run_files.run_folder import RunFolder

USEFUL = "useful"  # training steps for the first time
REDONE = "redone"  # training steps again, after a crash or a rewind
COMPILING = "compiling"
EVALUATING = "evaluating"
CHECKPOINTING = "checkpointing"
DATA = "waiting for data"
STARTING = "starting"  # and ending
DOWN = "down"
TRAINING = "training"  # useful or redone
_MEASURED = (USEFUL, REDONE, COMPILING, EVALUATING, CHECKPOINTING, DATA, STARTING)
ACTIVITIES = (*_MEASURED, DOWN)
_PAUSES = (EVALUATING, CHECKPOINTING)

_LATEST = 1e11  # seconds since 1970: later times are damage
_MOST_LINES = 1000
_KEPT_LINES = 50  # of an attempt that has written more, beside the first: enough to estimate its speed


@dataclass(frozen=True)
class AttemptTime:
    """One line: how an attempt has spent its time so far."""

    start: float  # as time.time(), like `time`; identifies the attempt
    time: float
    step: int  # finished steps
    reached: int  # most finished steps so far, over all attempts
    total_steps: int | None  # of the run; None: not known
    activity: str  # at `time`
    seconds: Mapping[str, float]  # by activity
    end: float | None = None  # of the time budget, as time.time()

    @property
    def paused(self) -> float:
        """Seconds of evaluations and checkpoints."""
        return sum(self.seconds.get(activity, 0.0) for activity in _PAUSES)


@dataclass(frozen=True)
class Goodput:
    seconds: Mapping[str, float]  # by activity, all of `ACTIVITIES`
    attempts: int

    @property
    def wall_clock(self) -> float:
        """Seconds of all attempts and between them."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Useful share of wall-clock time."""
        return self.seconds[USEFUL] / max(self.wall_clock, 1e-9)


def add_up(lines: Sequence[AttemptTime]) -> Goodput:
    """Return the sum over the attempts with these lines, of which there is one at least. The clock may have been set
    while an attempt trained: its seconds are of a monotonic one."""
    attempts = last_lines(lines)
    seconds = {activity: sum(attempt.seconds.get(activity, 0.0) for attempt in attempts) for activity in _MEASURED}
    down = sum(max(0.0, later.start - earlier.time) for earlier, later in pairwise(attempts))
    return Goodput({**seconds, DOWN: down}, len(attempts))


def last_lines(lines: Sequence[AttemptTime]) -> list[AttemptTime]:
    """Return the last line of each attempt, oldest attempt first: as in the file, because the clock may have been set
    back."""
    return list({line.start: line for line in lines}.values())


def read_attempt_times(folder: RunFolder) -> list[AttemptTime]:
    """Read all lines; empty without a file. Skips damaged ones, such as one that a copy has cut off. Raises OSError."""
    try:
        found = parse_records(AttemptTime, folder.goodput.read_bytes())
        return [line for line in found if 0 <= line.start <= _LATEST]
    except FileNotFoundError:
        return []


def reached_checkpoints(folder: RunFolder, lines: Sequence[AttemptTime]) -> list[Path]:
    """Return the complete checkpoints up to the step of the last line, oldest first: later ones are damaged, or the run
    would have resumed from them. Without lines, returns all. Raises OSError."""
    found = complete_checkpoints(folder.checkpoints)
    return [path for path in found if not lines or checkpoint_step(path) <= lines[-1].step]


def record_end(folder: RunFolder, start: float, now: Callable[[], float] = time.time) -> None:
    """Add a line for an attempt whose processes have ended. Its activity since its last line is known only if it was
    ending, or starting, then. `start`: as in its lines."""
    with suppress(OSError):
        for last in last_lines(read_attempt_times(folder)):
            if last.start == start and last.activity == STARTING:
                ended = max(last.time, now())
                ending = last.seconds.get(STARTING, 0.0) + ended - last.time
                _append(folder, replace(last, time=ended, seconds={**last.seconds, STARTING: ending}))


def process_start() -> float:
    """Return when this process started, as time.time(). `exec` keeps the start: with `sh -c 'prepare && exec
    deepcloze pretrain'` it is the start of the shell. `psutil.Process.create_time` alone is off by up to a second."""
    since_boot: float = psutil.Process().create_time() - psutil.boot_time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot  # read first, so that a delay cannot move the start back
    return time.time() - age


def attempt_start() -> float:
    """Return when the launch of this process began, or the process itself if the launch was on another machine, whose
    clock may differ; as time.time()."""
    created = process_start()
    with suppress(KeyError, ValueError):
        return min(float(os.environ[START_VARIABLE]), created)
    return created


def compile_seconds() -> float:
    """Return how long this process has compiled code with `torch.compile` so far: 0 until something is compiled."""
    if "torch._dynamo.utils" not in sys.modules:  # importing it takes seconds
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)


class CurrentActivity(NamedTuple):
    """The activity of a rank, see `ActivityTimer.doing`."""

    step: int  # finished steps
    activity: str
    changes: int  # a count that grows with each sign of progress


class ActivityTimer:
    """Times the activities of one attempt, and records them once `open` was called."""

    def __init__(
        self,
        start: float,
        compile_seconds: Callable[[], float] = compile_seconds,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        start: when the attempt was launched, as time.time(): the time since then was spent on starting.
        compile_seconds: how long this process has compiled so far, during any activity.
        """
        self._start, self._compile_seconds, self._clock, self._now = start, compile_seconds, clock, now
        self._activity = STARTING
        self._seconds = dict.fromkeys(_MEASURED, 0.0) | {STARTING: max(0.0, now() - start)}
        self._elapsed: defaultdict[str, float] = defaultdict(float)
        self._settled, self._compiled = clock(), compile_seconds()
        self._unfinished = 0.0  # seconds of the step that is being trained
        self._step, self._reached = 0, 0
        self._total_steps: int | None = None
        self._end: float | None = None
        self._earlier: list[AttemptTime] = []
        self._changes = 0
        self._folder: RunFolder | None = None
        self._lines: list[AttemptTime] = []  # of this attempt, in the file

    def open(
        self,
        folder: RunFolder,
        step: int,
        total_steps: int | None,
        seconds_left: float | None = None,
        finished: bool = False,
    ) -> None:
        """Record this attempt in the run folder, from now on. `step`: finished steps; `seconds_left`: of a time budget.
        Only rank 0 does. If the run is finished, only if the last line is of another step, as after the newest
        checkpoint was copied from a mirror: else the time since its end would count as downtime."""
        self._end = None if seconds_left is None else self._now() + seconds_left
        self._folder, self._step, self._reached, self._total_steps = folder, step, step, total_steps
        with suppress(OSError):  # a file that cannot be read now stays as it is
            self._earlier = last_lines(read_attempt_times(folder))
            if finished and all(attempt.step == step for attempt in self._earlier[-1:]):
                self._folder = None
                return
            self._rewrite()
        self._reached = max([step, *(attempt.reached for attempt in self._earlier)])
        self.record()

    @property
    def goodput(self) -> float:
        """Share of the run's time so far that was useful, over all attempts."""
        return add_up([*self._earlier, self._line()]).share

    def elapsed(self, activity: str) -> float:
        """Return seconds of an activity so far since this timer was made, `TRAINING` among them; compiling included."""
        self._settle()
        return self._elapsed[activity]

    def paused(self) -> float:
        """Return the seconds of evaluations and checkpoints so far."""
        return sum(map(self.elapsed, _PAUSES))

    @property
    def doing(self) -> CurrentActivity:
        """The current activity, for other threads: equal values mean that there was no progress."""
        return CurrentActivity(self._step, self._activity, self._changes)

    def make_progress(self) -> None:
        """Call within a long activity, such as after each microbatch or collective."""
        self._changes += 1

    @contextmanager
    def during(self, activity: str, recorded: bool = True) -> Iterator[None]:
        """Count the time inside as spent on the activity. recorded: add lines before and after it; not in each step."""
        before = self._switch(activity, recorded)
        try:
            yield
        finally:
            self._switch(before, recorded)

    def begin_training(self) -> None:
        """Count the time from now on as training, apart from blocks of `during`."""
        self._switch(TRAINING, recorded=True)

    def end_training(self) -> None:
        """Count the time from now on as the end of the attempt."""
        self._switch(STARTING, recorded=True)

    def finish_step(self, step: int) -> None:
        """Count the time of training since the last call for this step."""
        self._settle()
        self._seconds[USEFUL if step > self._reached else REDONE] += self._unfinished
        self._unfinished = 0.0
        self._step, self._reached = step, max(step, self._reached)

    def record(self) -> None:
        """Add a line. One that does not fit on the disk is dropped."""
        if self._folder is None:
            return
        line = self._line()
        with suppress(OSError):
            _append(self._folder, line)
            self._lines.append(line)
        if len(self._lines) >= _MOST_LINES:
            self._lines = [self._lines[0], *self._lines[-_KEPT_LINES:]]
            self._rewrite()

    def _rewrite(self) -> None:
        """Leave one line of each earlier attempt, and the lines of this one in `_lines`."""
        assert self._folder is not None
        with suppress(OSError):
            text = b"\n".join(map(_json, [*self._earlier, *self._lines])).decode()
            write_text(self._folder.goodput, text)

    def _switch(self, activity: str, recorded: bool) -> str:
        """Switch the activity. Returns the one before."""
        self._settle()
        before, self._activity = self._activity, activity
        self._changes += 1
        if recorded and activity != before:
            self.record()
        return before

    def _settle(self) -> None:
        """Count the time since the last call."""
        now, compiled = self._clock(), self._compile_seconds()
        elapsed = now - self._settled
        self._elapsed[self._activity] += elapsed
        compiling = min(max(0.0, compiled - self._compiled), elapsed)
        self._seconds[COMPILING] += compiling
        if self._activity == TRAINING:
            self._unfinished += elapsed - compiling
        else:
            self._seconds[self._activity] += elapsed - compiling
        self._settled, self._compiled = now, compiled

    def _line(self) -> AttemptTime:
        self._settle()
        current = USEFUL if self._step >= self._reached else REDONE
        seconds = {**self._seconds, current: self._seconds[current] + self._unfinished}
        return AttemptTime(
            self._start, self._now(), self._step, self._reached, self._total_steps, self._activity, seconds, self._end
        )


def _append(folder: RunFolder, line: AttemptTime) -> None:
    with folder.goodput.open("ab") as file:
        file.write(b"\n" + _json(line))  # in front: the last line may be cut off


def _json(line: AttemptTime) -> bytes:
    rounded = {activity: round(seconds, 3) for activity, seconds in line.seconds.items()}
    return json.dumps(asdict(line) | {"time": round(line.time, 3), "seconds": rounded}).encode()
