"""Whether a launch starts its ranks again after they have ended, and when. Pure."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from experiment.run_files.outcome_file import Cause, Outcome
from launcher.supervision.launch_result import LaunchResult

WINDOW_SECONDS = 3600.0
"""`--max_restarts` counts the restarts within this time, and those since the last checkpoint."""

# Of a data worker that has raised an exception for good. One that was killed or hangs may work again.
_WORKER = re.compile(
    r"(?<=the data worker )\(pid \d+\) (?=failed at step \d+: (?!\w*(OS|Host|Timeout|Memory|Connection)))"
)
_FIRST_WAIT_SECONDS = 5.0
_MAX_WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class Attempt:
    """The end of one attempt at a launch."""

    result: LaunchResult
    end_time: float  # seconds, of any clock
    saved: bool  # a checkpoint
    joins_hosts: bool = False  # ended by the launcher itself, because hosts have returned; not a failure
    left_out: Collection[str] = ()  # hosts without which the next attempt runs; not counted either
    taken_back: Collection[str] = ()  # hosts that had been left out, without which the run has failed too; not counted

    @property
    def changes_hosts(self) -> bool:
        return self.joins_hosts or bool(self.left_out or self.taken_back)


@dataclass(frozen=True)
class Restart:
    """Start again after `wait_seconds`."""

    wait_seconds: float = 0.0
    halve_microbatch: bool = False


@dataclass(frozen=True)
class End:
    """Do not start again. `advice`: added to the message of a failure."""

    advice: str = ""


def decide(attempts: Sequence[Attempt], max_restarts: int, can_halve: bool) -> Restart | End:
    """Decide whether to restart after the last of one or more attempts. attempts: all of this launch, oldest first.
    max_restarts: after failures within `WINDOW_SECONDS`, and since the last checkpoint. can_halve: the microbatch."""
    last = attempts[-1]
    if last.changes_hosts:
        return Restart()
    if not _may_succeed_again(attempts):
        return End()
    halve = last.result.cause is Cause.OUT_OF_MEMORY
    if halve and not can_halve:
        return End("a microbatch is one sequence already; see docs/precision.md for what else saves memory")
    failures = [attempt for attempt in attempts if not attempt.changes_hosts]
    recent = [attempt for attempt in failures if last.end_time - attempt.end_time < WINDOW_SECONDS]
    # Attempts may take so long that few fit into the window.
    stuck = sum(not attempt.changes_hosts for attempt in _since_checkpoint(attempts))
    for count, limit in ((len(recent), "within an hour"), (stuck, "without a checkpoint")):
        if count > max_restarts:
            return End(_advice(max_restarts, halve, limit))
    return Restart(0.0 if stuck == 1 else min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** (stuck - 2)), halve)


def _may_succeed_again(attempts: Sequence[Attempt]) -> bool:
    *earlier, last = attempts
    result = last.result
    if result.outcome is Outcome.REFUSED:  # the config has worked, so perhaps a disk of a host has failed
        repeated = bool(earlier) and earlier[-1].result.outcome is Outcome.REFUSED
        return not repeated and any(attempt.saved for attempt in attempts)
    if result.cause is Cause.AGREED:  # such as a disk that is full
        return False
    if result.outcome is Outcome.STOPPED:  # by a signal to a rank, whose host will perhaps shut down
        return last.saved or result.cause is Cause.SIGNAL
    if result.outcome is not Outcome.FAILED:
        return False
    if result.cause is Cause.ERROR:  # the same twice without progress is a bug
        before = _since_checkpoint(earlier)
        compared = [*before[-1:], *[attempt for attempt in before if not attempt.changes_hosts][-1:]]
        return last.saved or not any(_exception(attempt.result) == _exception(result) for attempt in compared)
    return True


def _exception(result: LaunchResult) -> str:
    """Return the message of a failure without the process of a data worker, which differs between attempts."""
    return _WORKER.sub("", result.message)


def _advice(max_restarts: int, out_of_memory: bool, limit: str) -> str:
    if out_of_memory and max_restarts == 0:
        return "lower batch.microbatch_tokens, or let --max_restarts=1 halve it: the global batch stays the same"
    return f"not restarted: --max_restarts={max_restarts} {limit}" if max_restarts else ""


def _since_checkpoint(attempts: Sequence[Attempt]) -> Sequence[Attempt]:
    """Return the last attempt that has saved a checkpoint and those after it, or all if none has."""
    saved = [index for index, attempt in enumerate(attempts) if attempt.saved]
    return attempts[saved[-1] if saved else 0 :]
