"""Finds the rank for which a run hangs: it has stopped, or makes no progress while others wait for it.

The ranks write heartbeats to the run folder, which all hosts share (`experiment.run_files.heartbeat`). A rank whose
heartbeat does not change has stopped, or its host or disk has. If some rank makes no progress, ranks that do not wait
for others are the cause. The stack of a rank is in its log.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from experiment.errors import notify
from experiment.run_files.heartbeat import Heartbeat, hung_seconds, is_whole_stack, main_stack, read_heartbeat
from experiment.run_files.outcome_file import Cause, Outcome, read_rank_record, write_first_outcome
from experiment.run_files.run_folder import RunFolder

_STACK_SECONDS = 2.0
_MOST_NAMED = 4
_MOST_FRAMES = 12


@dataclass(frozen=True)
class RankLife:
    """The state of a rank, as its heartbeat tells it."""

    beat: Heartbeat
    silent_seconds: float  # since its heartbeat has changed


def hung_ranks(lives: Sequence[RankLife], ranks: int, limit: float) -> list[RankLife]:
    """Return the ranks for which a run of `ranks` ranks hangs; empty if it does not. lives: of the ranks that have
    started, and not ended. limit: in seconds."""
    # A rank that has not started is named by the ranks that try to connect to it.
    hangs = len(lives) == ranks and any(life.beat.stuck_seconds >= limit for life in lives)
    if not hangs and all(life.silent_seconds < limit for life in lives):
        return []
    # Ranks that wait for another one may have begun to do so before it stopped or was stuck.
    silent = [life for life in lives if _is_silent(life, limit)]
    stuck = [life for life in lives if _is_stuck(life, limit)]
    busy = [life for life in lives if not life.beat.waits]
    # All may wait for a moment: ranks that poll whether a part of their work has ended do so together.
    return silent or [life for life in busy if life in stuck] or busy or stuck


def _is_silent(life: RankLife, limit: float) -> bool:
    return life.silent_seconds >= limit / 2


def _is_stuck(life: RankLife, limit: float) -> bool:
    return life.beat.stuck_seconds >= limit / 2


class HangWatch:
    """Watches the ranks of an attempt. `message`: which rank hangs; None: none does. `hosts`: those of hung ranks."""

    def __init__(
        self,
        folder: RunFolder,
        ranks: int,
        hang_seconds: float,
        request_stack: Callable[[Heartbeat], None],
        end: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`end`: ends all processes of the launch."""
        self.message: str | None = None
        self.hosts: set[str] = set()
        self._folder = folder
        self._remaining = set(range(ranks))  # those not known to have ended
        self._request_stack = request_stack
        self._end_ranks = end
        self._limit = hung_seconds(hang_seconds)
        self._clock = clock
        self._checked = clock()
        self._lives: dict[int, RankLife] = {}
        self._log_sizes: dict[int, int] = {}  # before this attempt hangs

    def is_settled(self) -> bool:
        """Look at all ranks; end the run if it hangs. Returns whether it does."""
        now = self._clock()
        # No heartbeat was read while this machine was suspended: count a part of a long pause only. None was written
        # while the disk did not answer.
        writable = self._can_write()
        elapsed, self._checked = min(now - self._checked, self._limit / 4) if writable else 0.0, now
        for rank in self._remaining:
            self._look_at(rank, elapsed)
        hung = hung_ranks(list(self._lives.values()), len(self._remaining), self._limit)
        ended = {life.beat.rank for life in hung if self._has_ended(life.beat.rank)}
        self._remaining -= ended
        for rank in ended:
            del self._lives[rank]
        if not hung or ended or not writable:
            return False
        self._end(hung)
        return True

    def _look_at(self, rank: int, elapsed: float) -> None:
        known, beat = self._lives.get(rank), read_heartbeat(self._folder, rank)
        if beat is not None and (known is None or beat.number != known.beat.number):
            self._lives[rank] = RankLife(beat, 0.0)
            self._log_sizes.setdefault(rank, self._log_size(rank))
        elif known is not None:
            self._lives[rank] = RankLife(known.beat, known.silent_seconds + elapsed)

    def _log_size(self, rank: int) -> int:
        with suppress(OSError):
            return self._folder.rank_log(rank).stat().st_size
        return 0

    def _has_ended(self, rank: int) -> bool:
        process = read_rank_record(self._folder, rank)
        return process is not None and process.exit is not None

    def _can_write(self) -> bool:
        """Return whether the run folder can be written: heartbeats need it."""
        try:
            os.utime(self._folder.logs)
        except OSError:
            return False
        return True

    def _end(self, hung: Sequence[RankLife]) -> None:
        self.hosts = {life.beat.host for life in hung}
        named = hung[:_MOST_NAMED]
        self._get_stacks(named)
        more = f"; and {len(hung) - len(named)} more ranks" if len(hung) > len(named) else ""
        summary = "; ".join(self._describe(life) for life in named) + more
        stacks = "\n".join(self._stack(life.beat.rank) for life in named)
        self.message = f"{summary}\n{stacks}"
        notify(f"{summary}; ending all ranks")
        with suppress(OSError):
            write_first_outcome(self._folder, Outcome.FAILED, self.message, Cause.HUNG)
        self._end_ranks()

    def _get_stacks(self, named: Sequence[RankLife]) -> None:
        """Ask ranks for their stacks, except those that make no progress, which have written theirs."""
        for life in named:
            if not _is_stuck(life, self._limit):  # a stack in its log is an earlier one, which the user asked for
                self._log_sizes[life.beat.rank] = self._log_size(life.beat.rank)
        missing = {life.beat.rank for life in named if not is_whole_stack(self._frames(life.beat.rank))}
        for life in named:
            if life.beat.rank in missing:
                self._request_stack(life.beat)
        deadline = time.monotonic() + _STACK_SECONDS
        while missing and time.monotonic() < deadline:
            time.sleep(0.02)
            missing = {rank for rank in missing if not is_whole_stack(self._frames(rank))}

    def _frames(self, rank: int) -> list[str]:
        return main_stack(self._folder.rank_log(rank), self._log_sizes.get(rank, 0))

    def _describe(self, life: RankLife) -> str:
        beat = life.beat
        if _is_silent(life, self._limit):
            what = f"no sign of life for {life.silent_seconds:.0f} s"
        elif _is_stuck(life, self._limit):
            what = f"no progress for {beat.stuck_seconds:.0f} s"
        else:
            what = "others wait for it"
        where = f"after step {beat.step}, {beat.activity}"
        return f"{beat.host}, rank {beat.rank} (process {beat.pid}) hangs: {what} ({where})"

    def _stack(self, rank: int) -> str:
        log = self._folder.rank_log(rank)
        if not (frames := self._frames(rank)):
            return f"the stack of rank {rank} is not known: it does not react to signals"
        more = ["…"] if len(frames) > _MOST_FRAMES else []
        lines = "\n".join(f"  {frame}" for frame in [*frames[:_MOST_FRAMES], *more])
        return f"the main thread of rank {rank}, innermost call first; all threads: {log}\n{lines}"
