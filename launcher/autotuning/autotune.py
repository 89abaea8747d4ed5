"""`deepcloze pretrain --autotune`: find the fastest microbatch that fits in memory, before a launch.

The first trial has the configured microbatch, and larger ones as long as they get faster. If the configured one does
not fit, further trials have smaller ones. The global batch and the results stay the same.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from experiment.errors import StoppedError, UserError, notify
from experiment.outcome_file import Cause, Outcome
from experiment.run_folder import open_run_folder
from experiment.run_lock import Renewal, lock_run
from experiment.signals import handle_stop_signals
from launcher.autotuning.autotune_trial import Speed, TrialResult, TrialRunner, remove_trials
from launcher.launch_plan import LaunchPlan, max_doublings, max_halvings, scaled_microbatch
from launcher.supervision.launch_result import LaunchResult

LIMIT_SECONDS = 120.0
"""Of all trials together, with the time that their ranks take to start."""

_LEAST_GAIN = 1.02  # a size is faster than another one if it is by this factor: less may be chance
_MEMORY_CAUSES = (Cause.OUT_OF_MEMORY, Cause.KILLED)  # the system kills ranks that use up the memory of a host


@dataclass(frozen=True)
class Findings:
    """What the trials found. Sizes are doublings of the configured microbatch."""

    choice: int
    speeds: Mapping[int, Speed] = field(default_factory=dict)
    failures: Mapping[int, LaunchResult] = field(default_factory=dict)


class TrialsFailedError(Exception):
    """The run would fail as the trial did."""


def autotune(plan: LaunchPlan, dead_owner: Renewal | None = None) -> LaunchPlan:
    """The plan with the microbatch that trials found to be the fastest. Prints a table of the trials.

    `dead_owner`: what `check_unlocked` has returned.

    Raises StoppedError for a signal, and UserError or SystemExit if the ranks rejected the run, or failed with every
    size.
    """
    folder = open_run_folder(plan.folder.path)
    ranks = sum(map(len, plan.slots.values()))
    runner = TrialRunner(plan, time.monotonic() + LIMIT_SECONDS, is_enough)
    with handle_stop_signals(lambda _: runner.interrupt()), lock_run(folder, runner.interrupt, dead_owner):
        remove_trials(folder)  # of a command that was killed
        notify(f"autotune: trying microbatch sizes for at most {LIMIT_SECONDS:.0f} s")
        try:
            sizes = range(-max_halvings(plan.config), max_doublings(plan.config, ranks) + 1)
            findings = find_fastest(runner.run, sizes)
        except TrialsFailedError as error:
            sys.exit(f"deepcloze: the run failed during --autotune: {error}\nlogs: {folder.trials}")
        except BaseException:
            remove_trials(folder)
            raise
        remove_trials(folder)
    if runner.interrupted:
        raise StoppedError("stopped during --autotune, before the first step; run the same command again")
    _print_table(plan, findings)
    if findings.choice == 0:
        return plan
    return replace(plan, config=scaled_microbatch(plan.config, findings.choice), config_changed=True)


def find_fastest(run_trial: Callable[[Sequence[int]], TrialResult], sizes: range) -> Findings:
    """Find the fastest of the sizes, which include 0.

    Raises UserError if the ranks rejected the run, TrialsFailedError if they failed for another reason than memory, or
    with all sizes.
    """
    failures: dict[int, LaunchResult] = {}
    tried = range(sizes.stop)
    while True:
        result = run_trial(tried)
        failure = result.failure
        if failure is not None and len(result.speeds) < len(tried):
            failures[tried[len(result.speeds)]] = failure
        if result.speeds or failure is None or failure.cause is Cause.LOST_HOST:
            # Nothing measured: there was no time, or a host is lost, which the launch that follows can do without.
            return Findings(fastest(result.speeds) if result.speeds else tried[0], result.speeds, failures)
        if failure.outcome is Outcome.REFUSED:
            raise UserError(failure.message)
        if failure.outcome is Outcome.STOPPED:
            raise StoppedError(failure.message)
        if failure.cause not in _MEMORY_CAUSES:
            raise TrialsFailedError(failure.message)
        if tried[0] == sizes[0]:
            raise TrialsFailedError(
                f"{failure.message}\na microbatch of one sequence does not fit; see docs/precision.md for what else "
                "saves memory"
            )
        tried = range(max(sizes[0], tried[0] - 2), tried[0])


def fastest(speeds: Mapping[int, Speed]) -> int:
    """The smallest size that no larger one beats clearly."""
    choice, *larger = sorted(speeds)
    for size in larger:
        if _is_faster(speeds[size], speeds[choice]):
            choice = size
    return choice


def is_enough(speeds: Sequence[Speed]) -> bool:
    """Whether the last size is no faster than the one before: larger ones will not be either."""
    return len(speeds) > 1 and not _is_faster(speeds[-1], speeds[-2])


def _is_faster(one: Speed, other: Speed) -> bool:
    return one.tokens_per_second > _LEAST_GAIN * other.tokens_per_second


def _print_table(plan: LaunchPlan, findings: Findings) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("microbatch_tokens", "tokens/s", "memory", ""):
        table.add_column(name, justify="right" if name else "left")
    for size in sorted({*findings.speeds, *findings.failures, findings.choice}):
        table.add_row(f"{scaled_microbatch(plan.config, size).batch.microbatch_tokens:,}", *_cells(findings, size))
    with suppress(OSError):  # the terminal may be closed
        Console(stderr=True, highlight=False, markup=False).print(table)


def _cells(findings: Findings, size: int) -> tuple[str, str, str]:
    """Tokens per second, memory and a remark."""
    chosen = "chosen" if size == findings.choice else ""
    if (speed := findings.speeds.get(size)) is not None:
        return f"{speed.tokens_per_second:,.0f}", f"{speed.memory / 2**30:.1f} GiB", chosen
    if (failure := findings.failures.get(size)) is not None:
        reason = "out of memory" if failure.cause in _MEMORY_CAUSES else failure.message.partition("\n")[0]
        return "–", "–", reason
    return "–", "–", f"{chosen}: not measured in time"
